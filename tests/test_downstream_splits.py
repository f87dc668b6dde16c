"""A set that cannot answer the question is refused, with counts; a missing validation split is made and said."""

from dataclasses import replace

import numpy as np
import pytest

from wardround.data import LabelledImages
from wardround.downstream.splits import split
from wardround.errors import DataError


def labelled(patients: int = 40, images_each: int = 3, classes: int = 2) -> LabelledImages:
    """Return a set whose patients go to train, train, train, val, test in turn; class by patient."""
    patient = np.repeat(np.arange(patients), images_each)
    turn = np.array(["train", "train", "train", "val", "test"])
    return LabelledImages(
        images=np.zeros((len(patient), 1, 4, 4), np.uint8),
        labels=(patient // 5 % classes).astype(np.int64),
        classes=tuple("abc"[:classes]),
        patients=patient,
        sites=np.full(len(patient), "s"),
        splits=turn[patient % 5],
    )


def test_the_given_splits_are_kept() -> None:
    found = split(labelled())
    assert [len(part) for part in (found.train, found.val, found.test)] == [72, 24, 24]
    assert found.notes == ()


def test_without_a_validation_split_patients_of_train_serve_as_it_and_the_result_says_so() -> None:
    images = labelled()
    found = split(replace(images, splits=np.where(images.splits == "val", "train", images.splits)))
    assert len(found.train) + len(found.val) == 96
    assert 0.2 * 96 <= len(found.val) <= 0.2 * 96 + 6
    assert not set(images.patients[found.train]) & set(images.patients[found.val])
    assert found.notes == (
        f"no split val: {len(found.val)} images of {len(found.val) // 3} patients of train serve as it",
    )


def test_images_of_other_splits_are_left_out_and_counted() -> None:
    images = labelled()
    found = split(replace(images, splits=np.where(images.patients == 0, "unlabelled", images.splits)))
    assert found.notes == ("3 images of the splits 'unlabelled' are left out: the words are train, val and test",)


def test_images_that_name_no_patient_are_counted_since_nothing_tells_whether_one_is_in_two_splits() -> None:
    images = labelled()
    named = images.patients > 1
    (note,) = split(replace(images, named=named, splits=np.where(images.patients == 0, "other", images.splits))).notes[
        1:
    ]
    assert note.startswith("NO PATIENT: 3 of 117 images name none, and each counts as a patient of its own")
    assert split(replace(images, named=np.ones_like(named))).notes == ()


def test_a_patient_in_two_splits_is_refused_with_counts() -> None:
    images = labelled()
    images.splits[0] = "test"  # patients 0 and 1 of train, and 3 of val
    images.splits[3] = "test"
    images.splits[9] = "test"
    with pytest.raises(DataError, match=r"3 of 40 patients .* \(2 in train and test, 1 in val and test\)"):
        split(images)


def test_one_class_is_refused() -> None:
    images = labelled()
    with pytest.raises(DataError, match="all labels are 'a'"):
        split(replace(images, labels=np.zeros_like(images.labels)))


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_class_that_a_split_lacks_is_named(name: str) -> None:
    images = labelled(classes=3)
    other = np.where((images.splits == name) & (images.labels == 1), 2, images.labels)
    with pytest.raises(DataError, match=f"split {name} has none of 1 classes \\('b'\\)"):
        split(replace(images, labels=other))


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_split_that_is_missing_is_named(name: str) -> None:
    images = labelled()
    with pytest.raises(DataError, match=f"has split {name}; its splits are .*other.* The words are train"):
        split(replace(images, splits=np.where(images.splits == name, "other", images.splits)))


def test_too_few_patients_to_take_a_validation_split_from_are_refused() -> None:
    images = labelled(patients=10)
    one_each = np.where((images.splits == "train") & (images.patients % 5 != 0), "other", images.splits)
    one_each = np.where(one_each == "val", "other", one_each)
    with pytest.raises(DataError, match="of 0 images, split train has none of 2 classes"):
        split(replace(images, splits=one_each))


def test_forced_splits_are_measured_and_the_result_says_so() -> None:
    images = labelled()
    images.splits[0] = "test"
    with pytest.raises(DataError, match="or say --force-splits"):
        split(images)
    found = split(images, force=True)
    assert found.notes == (
        "FORCED: 1 of 40 patients are in more than one split (1 in train and test), "
        "so the scores measure in part who is recognised",
    )
    assert len(found.test) == 25


def several() -> LabelledImages:
    """Return a set of three labels: every second patient has the first, every image but one in four the others."""
    images = labelled()
    places = np.arange(len(images.labels))
    return replace(
        images,
        labels=np.stack([images.labels, places % 4 > 0, places % 4 < 2], axis=1).astype(np.int64),
        classes=("a", "b", "c"),
    )


def test_several_labels_an_image_are_split_alike() -> None:
    assert [len(part) for part in vars(split(several())).values()] == [72, 24, 24, 0]


def test_a_label_that_a_split_lacks_or_that_all_its_images_have_is_named() -> None:
    images = several()
    test = images.splits == "test"
    without, everywhere = images.labels.copy(), images.labels.copy()
    without[test, 1], everywhere[test, 2] = 0, 1
    with pytest.raises(DataError, match=r"split test has none of 1 classes \('b'\)"):
        split(replace(images, labels=without))
    with pytest.raises(DataError, match="all 24 images of split test have the label 'c'"):
        split(replace(images, labels=everywhere))
    with pytest.raises(DataError, match="all images have the same"):
        split(replace(images, labels=np.ones_like(images.labels)))
