"""A whole site as the privacy unit: what is clipped, what is added, what it is divided by, and who sees it.

Each statistical test fails by chance with a probability below 1e-6.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny, write_labelled
from honest_sites import SITES, Cut, Sites, ignore, make_run
from scipy import stats

from wardround.config.privacy import SitePrivacyConfig
from wardround.errors import ConfigError, UpdateError
from wardround.privacy.accounting import Mechanism, epsilon
from wardround.privacy.site_level import CLIP, clipped, factor, next_clip, noise, noisy_mean, norm, privatise, spent
from wardround.privacy.statement import statement
from wardround.registry.mlflow_store import Store
from wardround.registry.tensors import TensorWriter
from wardround.server import release, tracking
from wardround.server.rounds import run_rounds
from wardround.server.run_folder import RunFolder, open_run
from wardround.simulate import simulate
from wardround.update import Array, Refusal, State, Task, Update

ROUNDS = 4
SITE: dict[str, Any] = {"unit": "site", "epsilon": 4.0, "delta": 1e-4, "clip": 0.5, "cohort": 3}
FIXED = SitePrivacyConfig(**SITE)
CHANCE = 1e-7


def federation(**privacy: Any) -> dict[str, Any]:
    return {"privacy": SITE | privacy, "aggregation": {"weights": "uniform"}}


def reader(deltas: Mapping[str, State]) -> Any:
    return lambda site, name: deltas[site][name]


def inside(squares: float, freedom: int) -> bool:
    """Return whether a sum of squares may be a chi-square variable of so many degrees of freedom."""
    return bool(stats.chi2.ppf(CHANCE, freedom) < squares < stats.chi2.isf(CHANCE, freedom))


def test_a_delta_is_clipped_over_all_its_tensors_together_scalars_too() -> None:
    delta = {"w": np.array([[3.0, 0.0]], np.float32), "scale": np.array(4.0, np.float32)}
    assert norm(delta.items()) == 5.0  # the root of 9 + 16
    kept = factor(5.0, 2.0)
    assert kept == pytest.approx(0.4, rel=1e-11)
    assert clipped(delta["w"], kept).tolist() == [[pytest.approx(1.2), 0.0]]
    assert clipped(delta["scale"], kept).shape == () and float(clipped(delta["scale"], kept)) == pytest.approx(1.6)
    assert factor(5.0, 5.0) == 1.0 and factor(0.0, 5.0) == 1.0


def test_whole_numbers_are_refused_by_name() -> None:
    delta = {"w": np.zeros(2, np.float32), "counter": np.array(7)}
    with pytest.raises(ConfigError, match=r"tensor 'counter' holds int64, which takes no Gaussian noise"):
        privatise(delta, FIXED, ROUNDS)
    with pytest.raises(ConfigError, match="tensor 'counter'"):
        noisy_mean(reader({"lyon": delta}), ["lyon"], delta, FIXED, ROUNDS, 0.5)


def test_a_site_more_or_less_moves_the_sum_by_no_more_than_c() -> None:
    draw = np.random.default_rng(0)
    deltas: list[State] = [{"w": np.full(5, value, np.float32)} for value in (0.0, 3e38, -3e38, 1e-45, np.nan, np.inf)]
    for _ in range(200):
        size = 10.0 ** draw.uniform(-6, 6)
        parts = {"w": draw.normal(size=(3, 4)) * size, "b": draw.standard_cauchy(5) * size, "s": draw.normal() * size}
        deltas.append({name: np.asarray(part, np.float32) for name, part in parts.items()})
    for delta in deltas:
        clip = float(10.0 ** draw.uniform(-3, 3))
        kept = factor(norm(delta.items()), clip)
        moved = math.sqrt(sum(float((clipped(array, kept) ** 2).sum()) for array in delta.values()))
        assert moved <= clip
        if 0 < norm(delta.items()) < math.inf:  # and no more is taken than must be
            assert moved == pytest.approx(min(clip, norm(delta.items())), rel=1e-9)


def test_all_rounds_together_spend_epsilon_without_amplification() -> None:
    sigma = noise(FIXED, ROUNDS).delta
    assert epsilon([Mechanism(1.0, sigma, ROUNDS)], 1e-4) <= 4.0 < epsilon([Mechanism(1.0, 0.99 * sigma, ROUNDS)], 1e-4)
    # Four Gaussians are one of half the deviation: its exact delta (Balle and Wang 2018, theorem 8)
    mu = math.sqrt(ROUNDS) / sigma
    exact = stats.norm.cdf(mu / 2 - 4.0 / mu) - math.exp(4.0) * stats.norm.cdf(-mu / 2 - 4.0 / mu)
    assert 0.98e-4 < exact <= 1e-4
    assert spent(FIXED, ROUNDS, ROUNDS) <= 4.0
    assert 0.0 == spent(FIXED, ROUNDS, 0) < spent(FIXED, ROUNDS, 1) < spent(FIXED, ROUNDS, 2)


def test_the_noise_of_the_mean_is_that_of_the_guarantee_over_the_cohort() -> None:
    n = 40_000
    state: State = {"w": np.zeros((n // 2, 2), np.float32)}
    mean, clip = noisy_mean(reader({"lyon": state}), ["lyon"], state, FIXED, ROUNDS, 0.25)
    deviation = noise(FIXED, ROUNDS).delta * 0.25 / 3
    one, other = mean("w"), mean("w")
    assert inside(float((one**2).sum()) / deviation**2, n)
    assert not inside(float(((0.9 * one) ** 2).sum()) / deviation**2, n)
    assert not np.array_equal(one, other)  # fresh at each call
    assert clip == 0.25


def test_what_leaves_a_site_carries_the_whole_noise() -> None:
    n = 40_000
    config = SitePrivacyConfig(**SITE | {"noise": "site"})
    delta: State = {"w": np.full(n, 3.0, np.float32), "s": np.array(3.0, np.float32)}
    sent = privatise(delta, config, ROUNDS)
    assert {name: (array.shape, array.dtype) for name, array in sent.items()} == {
        name: (array.shape, array.dtype) for name, array in delta.items()
    }
    hidden = 0.5 / math.sqrt(n + 1)  # each number of a delta of n + 1 equal ones, clipped to 0.5
    deviation = noise(config, ROUNDS).delta * 0.5
    assert inside(float(((sent["w"].astype(np.float64) - hidden) ** 2).sum()) / deviation**2, n)


def test_a_delta_that_is_not_finite_leaves_as_noise_alone() -> None:
    config = SitePrivacyConfig(**SITE | {"noise": "site"})
    sent = privatise({"w": np.full(1000, np.nan, np.float32)}, config, ROUNDS)["w"]
    assert inside(float((sent.astype(np.float64) ** 2).sum()) / (noise(config, ROUNDS).delta * 0.5) ** 2, 1000)


@pytest.mark.parametrize("present", [1, 2, 3])
def test_the_sum_is_divided_by_the_cohort_whoever_answered(present: int) -> None:
    config = SitePrivacyConfig(**SITE | {"epsilon": 1000.0, "delta": 0.1})  # little noise
    n, full = 100, 0.5 / 10  # n numbers of a delta whose norm is C: not clipped
    deltas: dict[str, State] = {site: {"w": np.full(n, full, np.float32)} for site in SITES[:present]}
    mean, _ = noisy_mean(reader(deltas), deltas, deltas["lyon"], config, 1, 0.5)
    deviation = noise(config, 1).delta * 0.5 / 3 / math.sqrt(n)  # of the mean over the numbers
    assert 6 * deviation < full / 3 / 2
    assert abs(float(mean("w").mean()) - present * full / 3) < 6 * deviation


def test_the_norm_moves_by_the_published_step() -> None:
    norms = {"lyon": 0.5, "oslo": 1.5, "wien": 3.0}
    # a third of the sites fit 1.0, half are to: C grows by exp(0.2 / 6)
    assert next_clip(1.0, norms, 0.5, 3) == pytest.approx(math.exp(0.2 / 6))
    # the noise adds 0.3 of a site
    assert next_clip(1.0, norms, 0.5, 3, chance=0.3) == pytest.approx(math.exp(-0.2 * ((1 + 0.3) / 3 - 0.5)))
    # a missing site is neither: (0.5 - 0.5) / 3 + 0.5 of them fit
    assert next_clip(1.0, {"lyon": 0.5, "oslo": 1.5}, 0.5, 3) == 1.0


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("start", [0.01, 100.0])
def test_without_noise_the_norm_settles_at_the_quantile(quantile: float, start: float) -> None:
    norms = {str(number): float(number) for number in range(1, 101)}
    clip = start
    for _ in range(300):
        clip = next_clip(clip, norms, quantile, 100)
    assert clip == pytest.approx(100 * quantile, abs=1.5)


def test_sum_and_count_together_cost_what_the_sum_alone_would() -> None:
    wide = SITE | {"cohort": 200}
    adaptive = noise(SitePrivacyConfig(**wide | {"clip_quantile": 0.5}), ROUNDS)
    fixed = noise(SitePrivacyConfig(**wide), ROUNDS)
    assert adaptive.count == 10.0 and fixed.count == 0.0
    # the count moves by one half with a site, so its noise multiplier is 20
    assert adaptive.delta == pytest.approx((fixed.delta**-2 - 20.0**-2) ** -0.5)
    both = [Mechanism(1.0, adaptive.delta, ROUNDS), Mechanism(1.0, 20.0, ROUNDS)]
    assert epsilon(both, 1e-4) == pytest.approx(epsilon([Mechanism(1.0, fixed.delta, ROUNDS)], 1e-4), rel=1e-3)


def test_a_cohort_too_small_to_be_counted_is_refused_with_the_size_that_is_not() -> None:
    sigma = noise(FIXED, ROUNDS).delta
    enough = math.floor(10 * sigma) + 1
    with pytest.raises(ConfigError, match=rf"that takes a cohort above {enough - 1}\. Remove it"):
        noise(SitePrivacyConfig(**SITE | {"clip_quantile": 0.5}), ROUNDS)
    assert noise(SitePrivacyConfig(**SITE | {"clip_quantile": 0.5, "cohort": enough}), ROUNDS).delta > sigma


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregation": {"weights": "images"}}, r"\[aggregation\] weights = 'images'; set weights = 'uniform'"),
        ({"backbone": {"frozen_stages": 1}}, "set frozen_stages = 0"),
    ],
)
def test_what_would_break_or_be_broken_by_the_noise_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny(**{**federation(), **changes})


def test_a_norm_that_cannot_adapt_stops_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clip_quantile"):
        make_run(tmp_path / "run", **federation(clip_quantile=0.5))


def test_more_sites_than_the_cohort_stop_before_training(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **federation(cohort=2))
    sites = Sites(run)
    with pytest.raises(ConfigError, match="cohort = 2: there are 3 sites"):
        run_rounds(run, sites, ignore)
    assert sites.asked == []


def moved(run: RunFolder, number: int) -> State:
    """Return what a round added to the state."""
    before, after = (run.checkpoint(which).state for which in (number - 1, number))
    return {name: array.astype(np.float64) - before[name] for name, array in after.items()}


def test_a_round_adds_noise_once_to_every_number_of_the_state(tmp_path: Path) -> None:
    class Still(Sites):
        def update(self, site: str, task: Task) -> Update:
            update = super().update(site, task)
            return Update(**{**vars(update), "delta": {n: np.zeros_like(a) for n, a in update.delta.items()}})

    run = make_run(tmp_path / "run", **federation(clip=30.0))
    run_rounds(run, Still(run), ignore)
    deviation = noise(run.config.privacy, 2).delta * 30.0 / 3  # type: ignore[arg-type]
    change = moved(run, 1)
    size = sum(array.size for array in change.values())
    assert inside(norm(change.items()) ** 2 / deviation**2, size)
    assert all(array.any() for array in change.values())


def test_the_norm_that_adapts_lies_in_the_checkpoint_and_goes_on_from_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **federation(epsilon=1000.0, delta=0.1, cohort=1000, clip_quantile=0.5))
    run_rounds(run, Sites(run), ignore)
    first, second = (float(run.checkpoint(number).server[CLIP]) for number in (1, 2))
    # None of three norms fits 0.5, and 997 sites are missing: a step of about exp(0.2 * 1.5 / 1000), and its noise
    assert 0 < abs(first / 0.5 - 1) < 0.2 * 6 * 50 / 1000
    assert 0 < abs(second / first - 1) < 0.2 * 6 * 50 / 1000


def test_momentum_works_on_what_is_noised_already_and_keeps_c_beside_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", privacy=SITE, aggregation={"weights": "uniform", "momentum": 0.9})
    run_rounds(run, Sites(run), ignore)
    velocity, change = run.checkpoint(2).server, moved(run, 2)
    assert velocity.keys() == change.keys() | {CLIP}
    for name, array in change.items():
        np.testing.assert_allclose(array, velocity[name], rtol=1e-4, atol=1e-5)


def test_what_was_noised_before_a_kill_is_never_seen_and_the_next_try_draws_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two noised states of one round would average the noise out, and cost twice."""
    run = make_run(tmp_path / "run", **federation())
    real, written = TensorWriter.put, list[bytes]()

    def cut_after_a_tensor(file: TensorWriter, name: str, array: Array) -> None:
        if written:
            raise Cut
        real(file, name, array)
        written.append(array.tobytes())

    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "put", cut_after_a_tensor)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # who is killed tidies nothing up
        with pytest.raises(Cut):
            run_rounds(run, Sites(run), ignore)
    assert run.committed() == [0]
    secret = written[0][-64:]
    assert [path for path in run.round(1).rglob("*") if path.is_file() and secret in path.read_bytes()]
    again = Sites(run)
    run_rounds(open_run(tmp_path / "run"), again, ignore)
    assert all(number == 2 for _, number in again.asked)  # round 1 was decided: folded again, not trained
    blocks = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [block for block in blocks if secret in block]
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_with_noise_at_the_site_the_server_adds_none_and_takes_no_measured_figure(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **federation(noise="site"), membership={"min_sites": 2})

    class Quiet(Sites):
        def update(self, site: str, task: Task) -> Update:
            update = super().update(site, task)
            declared = type(update.declared)(steps=3, version="0.1.0")
            return update if site == "wien" else Update(**{**vars(update), "declared": declared})

    sites = Quiet(run)
    sent: dict[str, dict[str, Array]] = {}

    def ask(tasks: Mapping[str, Task]) -> Iterator[tuple[str, bytes | Refusal]]:
        for site, task in tasks.items():
            sent[site] = sent.get(site) or sites.update(site, task).delta
            yield site, sites.answer(site, task)

    run_rounds(run, ask, ignore)
    assert "declares figures that [privacy] unit = 'site' withholds" in run.record(1)["refused"]["wien"]
    for name, change in moved(run, 1).items():
        np.testing.assert_allclose(change, (sent["lyon"][name] + sent["oslo"][name]) / 3.0, atol=1e-5)


def test_the_statement_says_whom_it_protects_against() -> None:
    outside = "Timing, availability and the choice of hyper-parameters are outside it."
    assert statement(FIXED, 20) == (
        "The states released through round 20 are (4.000, 0.0001)-differentially private in one whole site, against "
        f"other sites and users, not against the server. {outside}"
    )
    at_site = SitePrivacyConfig(**SITE | {"noise": "site"})
    assert statement(at_site, 20, epsilon=2.00001) == (
        "The updates and states released through round 20 are (2.001, 0.0001)-differentially private in one whole "
        f"site, against other sites and users, also against the server. {outside}"
    )
    patient = tiny(privacy={"unit": "patient", "epsilon": 8.0, "delta": 1e-5}).privacy
    assert statement(patient, 20) == (
        "Everything a site releases through round 20 is (8.000, 1e-05)-differentially private under adding or removing "
        f"one patient at that site, against the server and the other sites. {outside}"
    )
    assert statement(tiny().privacy, 20) == "none: the coordinator may be able to reconstruct images"


@pytest.mark.parametrize("unit", ["none", "site"])
def test_what_ails_a_sites_training_crosses_only_without_privacy(tmp_path: Path, unit: str) -> None:
    data = write_labelled(tmp_path / "data", dict.fromkeys(SITES, 10))
    without = {} if unit == "none" else federation(noise="site")
    config = tiny(**without, data={"std": [1e-40]})  # pixels over it are infinite
    with pytest.raises(UpdateError) as refused:
        simulate(config, data, tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}", threads=1)
    if unit == "none":
        assert "training: site 'lyon', round 1: the loss is nan at local step 1 of 3" in str(refused.value)
    else:
        assert "failed: the reason stands in the site's own log" in str(refused.value)
        assert "loss" not in str(refused.value)


@pytest.mark.parametrize("place", ["server", "site"])
def test_a_whole_federation_runs_and_its_release_says_what_it_promises(tmp_path: Path, place: str) -> None:
    data = write_labelled(tmp_path / "data", dict.fromkeys(SITES, 10))
    config = tiny(**federation(noise=place))
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = simulate(config, data, tmp_path / "run", store, threads=1)
    assert run.committed() == [0, 1, 2]
    # Noise in every number: its norm is that of the noise, for a clipped delta adds 0.5 at most.
    size = sum(array.size for array in moved(run, 1).values())
    scale = noise(config.privacy, 2).delta * 0.5 * math.sqrt(size) / 3  # type: ignore[arg-type]
    length = norm(moved(run, 1).items())
    assert length == pytest.approx(scale * (math.sqrt(3) if place == "site" else 1), rel=0.1)
    assert all((figures["loss"] is None) is (place == "site") for figures in run.record(2)["sites"].values())
    assert "loss" not in Store(store).models()[0].metrics  # told to the server at the most, without noise
    logged = tracking.shown(run, 2)
    assert logged["lyon/steps"] == 3 and not any(name.endswith(("loss", "images", "rank")) for name in logged)
    promised = release.guarantee(run)
    assert isinstance(promised, dict) and promised["unit"] == "site"
    assert promised["epsilon"] <= 4.0 and promised["adjacency"] == "add or remove one site"
    assert ("not against the server" in promised["statement"]) is (place == "server")
