"""Labelled folders: read whole, in the order of their table."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_labelled
from data_objects import some_pixels, write_dicom
from PIL import Image

from wardround.config.federation import DataConfig
from wardround.data import channel_constants, labelled_sites, read_labelled
from wardround.errors import DataError

AS_IS = DataConfig(image_size=20)  # the size that write_labelled writes


def test_images_labels_patients_sites_and_splits_come_in_the_tables_order(labelled: Path) -> None:
    found = read_labelled(labelled, AS_IS)
    rows = read_table(labelled)
    assert found.images.shape == (50, 1, 20, 20) and found.images.dtype == np.uint8
    for place, row in enumerate(rows):
        np.testing.assert_array_equal(found.images[place, 0], np.asarray(Image.open(labelled / row["file"])))
    assert [found.classes[label] for label in found.labels] == [row["label"] for row in rows]
    assert found.sites.tolist() == [row["site"] for row in rows]
    assert found.splits.tolist() == [row["split"] for row in rows]
    assert found.patients.tolist() == [place // 2 for place in range(50)]  # two images a patient
    assert (found.labels.dtype, found.patients.dtype) == (np.int64, np.int64)
    assert labelled_sites(labelled) == ["lyon", "oslo"]


def test_another_column_can_be_the_label_and_more_columns_do_not_matter(labelled: Path) -> None:
    table = (labelled / "labels.csv").read_text().splitlines()
    lines = [f"{line},{'grade' if place == 0 else f'g{place % 3}'}" for place, line in enumerate(table)]
    (labelled / "labels.csv").write_text("\n".join(lines))
    assert read_labelled(labelled, AS_IS).classes == ("a", "b")
    assert read_labelled(labelled, AS_IS, label="grade").classes == ("g0", "g1", "g2")
    with pytest.raises(DataError, match="lacks the column 'stage'; its columns are file, label, patient"):
        read_labelled(labelled, AS_IS, label="stage")


def test_a_patient_is_the_tables_else_the_files_and_without_either_a_file_is_one_of_its_own(tmp_path: Path) -> None:
    """Case does not count, as at a site: where two people are joined, the error is on the safe side."""
    of_file = ["P1", "P1", "", "", "p1", "p1"]
    for number, patient in enumerate(of_file):
        write_dicom(tmp_path / f"{number}.dcm", some_pixels(number), PatientID=patient)
    listed = ["", "Q", "", "", "q", ""]
    rows = [f"{number}.dcm,{'ab'[number % 2]},{patient},s,train" for number, patient in enumerate(listed)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label,patient,site,split", *rows]))
    found = read_labelled(tmp_path, AS_IS)
    assert found.patients.tolist() == [0, 1, 2, 3, 1, 0]
    assert found.named is not None and found.named.tolist() == [True, True, False, False, True, True]


def test_a_row_without_a_label_is_refused(labelled: Path) -> None:
    table = (labelled / "labels.csv").read_text().splitlines()
    name, _, *rest = table[4].split(",")
    table[4] = ",".join([name, "", *rest])
    (labelled / "labels.csv").write_text("\n".join(table))
    with pytest.raises(DataError, match=r"labels.csv, row 5: column 'label' is empty; give every image a label"):
        read_labelled(labelled, AS_IS)


def test_blanks_around_a_label_make_no_class_of_their_own(labelled: Path) -> None:
    """As of a patient, a site and a split, and as of several labels in a cell."""
    table = (labelled / "labels.csv").read_text().splitlines()
    lines = [line.replace(",a,", ", a ,") if place % 4 == 1 else line for place, line in enumerate(table)]
    (labelled / "labels.csv").write_text("\n".join(lines))
    assert ", a ," in "\n".join(lines)
    assert read_labelled(labelled, AS_IS).classes == ("a", "b")
    (labelled / "labels.csv").write_text("\n".join(line.replace(", a ,", ", ,") for line in lines))
    with pytest.raises(DataError, match="column 'label' is empty"):
        read_labelled(labelled, AS_IS)


def test_an_empty_table_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("")
    with pytest.raises(DataError, match=r"labels\.csv: is empty; expected a line that names its columns, file,"):
        read_labelled(tmp_path, AS_IS)
    (tmp_path / "labels.csv").write_text("file;label;patient;site;split\n")
    with pytest.raises(DataError, match=r"are file;label;patient;site;split\. Separate them by commas"):
        read_labelled(tmp_path, AS_IS)


def test_several_labels_stand_in_a_cell_and_an_empty_one_means_none(labelled: Path) -> None:
    table = (labelled / "labels.csv").read_text().splitlines()
    cells = ["effusion;mass", "", " mass ; mass"]
    lines = [f"{line},{'findings' if place == 0 else cells[place % 3]}" for place, line in enumerate(table)]
    (labelled / "labels.csv").write_text("\n".join(lines))
    found = read_labelled(labelled, AS_IS, "findings", multi_label=True)
    assert found.classes == ("effusion", "mass") and found.multi_label
    assert found.labels[:3].tolist() == [[0, 0], [0, 1], [1, 1]]
    assert found.one_hot is found.labels
    (labelled / "labels.csv").write_text("\n".join([lines[0], *lines[3::3]]))
    with pytest.raises(DataError, match=r"row 2: column 'findings' holds several labels .* say --multi-label"):
        read_labelled(labelled, AS_IS, "findings")


def test_any_column_makes_groups(labelled: Path) -> None:
    table = (labelled / "labels.csv").read_text().splitlines()
    lines = [f"{line},{'scanner' if place == 0 else ('A', 'B', '')[place % 3]}" for place, line in enumerate(table)]
    (labelled / "labels.csv").write_text("\n".join(lines))
    groups = read_labelled(labelled, AS_IS, by=("site", "scanner")).groups
    assert groups["scanner"][:3].tolist() == ["B", "(empty)", "A"]
    assert set(groups["site"]) == {"lyon", "oslo"}
    with pytest.raises(DataError, match="lacks the column 'age'; its columns are file"):
        read_labelled(labelled, AS_IS, by=("age",))


def test_an_image_that_cannot_be_read_stops_an_evaluation_with_its_name(labelled: Path) -> None:
    (labelled / "images/oslo-3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"'images/oslo-3.png': empty: 0 bytes. Mend it, or leave its row out"):
        read_labelled(labelled, AS_IS)


def test_channels_convert_only_where_the_config_says_so(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path / "colour", {"lyon": 4}, channels=3)
    with pytest.raises(DataError, match=r"it has 3 channels, and \[data\] channels is 1"):
        read_labelled(folder, AS_IS)
    grey = read_labelled(folder, AS_IS.model_copy(update={"convert_channels": True})).images
    colour = np.asarray(Image.open(folder / "images/lyon-0.png").convert("L"))
    assert np.abs(grey[0, 0].astype(int) - colour).max() <= 1


def test_constants_are_those_of_all_training_pixels(labelled: Path) -> None:
    found = read_labelled(labelled, AS_IS)
    pixels = found.images[found.splits == "train"] / np.float64(255)
    (mean,), (std,) = channel_constants(labelled, AS_IS)
    assert mean == pytest.approx(pixels.mean(), rel=1e-12) and std == pytest.approx(pixels.std(), rel=1e-12)


def test_constants_of_colour_are_a_channels_own(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path / "colour", {"lyon": 10}, channels=3)
    colour = DataConfig(image_size=20, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    found = read_labelled(folder, colour)
    pixels = found.images[found.splits == "train"] / np.float64(255)
    mean, std = channel_constants(folder, colour)
    assert mean == pytest.approx(pixels.mean(axis=(0, 2, 3))) and std == pytest.approx(pixels.std(axis=(0, 2, 3)))


@pytest.mark.parametrize(
    ("name", "count", "classes"), [("malaria_cells", 14_595, 2), ("bccd_cells", 2_124, 3), ("mednist_mini", 3_000, 6)]
)
def test_the_real_sets_are_read_as_their_table_says(
    shared_data: Callable[[str], Path], name: str, count: int, classes: int, tmp_path: Path
) -> None:
    folder = shared_data(name)
    table = read_table(folder)
    assert len(table) == count
    few = [row for place, row in enumerate(table) if place % 50 == 0]  # of all, the whole suite would take a minute
    (tmp_path / "images").symlink_to(folder / "images")
    with pytest.raises(DataError, match="lies behind a link to another folder"):
        write_table(tmp_path, few)
        read_labelled(tmp_path, AS_IS)
    (tmp_path / "images").unlink()
    for row in few:
        (tmp_path / row["file"]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / row["file"]).symlink_to(folder / row["file"])
    channels = 3 if name == "bccd_cells" else 1
    found = read_labelled(
        tmp_path, DataConfig(image_size=32, channels=channels, mean=(0.5,) * channels, std=(0.2,) * channels)
    )
    assert found.images.shape == (len(few), channels, 32, 32) and len(found.classes) == classes
    assert (found.images.reshape(len(few), -1).std(axis=1) > 1).all()


def read_table(folder: Path) -> list[dict[str, str]]:
    """Return the rows of labels.csv, read without Wardround."""
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(folder: Path, rows: list[dict[str, str]]) -> None:
    """Write labels.csv."""
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
