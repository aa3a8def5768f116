"""From evidence to outcomes: our figures for each claim, and the reason where one fails.

One function for each claim or pair of claims; every number in a sentence comes from the runs. Knows nothing of how
they were run.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from throttllem.profiling.measure import ProfilePlan
from throttllem.report.metrics import percent
from throttllem.reproduce.claims import OURS, PAPER, Claim, Outcome
from throttllem.reproduce.evidence import (
    HELD_OUT,
    Evidence,
    draw,
    each_of,
    label,
    p99_of,
    savings,
    slo_violations,
    time_by_size,
    violations,
)
from throttllem.reproduce.experiments import BATCHING_SETTINGS, GPU, MAIN_MODEL, Comparison
from throttllem.reproduce.probes import LOW_MHZ

_FITTED = (
    "The watts of this GPU are those of a served run on an A100-80GB SXM at 1,410 MHz; below that clock they have the "
    "shape of a sweep of the PCIe part. Nothing is fitted to the paper."
)
_CLAIMS = {claim.id: claim for claim in (*PAPER, *OURS)}


def outcomes(evidence: Evidence) -> list[Outcome]:
    """One outcome for every claim, in the order of the lists."""
    parts: tuple[Callable[[Evidence], list[Outcome]], ...] = (
        *(_model, _projection, _correlation, _clocks, _throttling),
        *(_autoscaling, _baseline, _slo, _smallest, _ours),
    )
    found = {outcome.claim.id: outcome for part in parts for outcome in part(evidence)}
    return [found[claim_id] for claim_id in _CLAIMS]


def _outcome(claim_id: str, ours: tuple[float, ...], basis: tuple[str, ...], **words: str) -> Outcome:
    claim: Claim = _CLAIMS[claim_id]
    return Outcome(claim=claim, ours=ours, basis=basis, **words)


def _model(evidence: Evidence) -> list[Outcome]:
    scores = evidence.scores()
    r2 = {name: score.r2 for name, score in scores.items() if score.r2 is not None}
    basis = tuple(
        f"throttllem profile profile.parquet --gpu {card.gpu} --model {card.model} "
        f"--sizes {','.join(str(score.tp) for score in card.scores if score.tp and score.split == HELD_OUT)} "
        f"--seed {evidence.sizes.study.seed} {BATCHING_SETTINGS} "
        f"&& throttllem train profile.parquet --out model  # {card.rows:,} rows, 10 % held out"
        for card in evidence.cards
    )
    mape = [score.mape_seconds for score in scores.values()]
    return [
        _outcome("model-r2", (min(r2.values()),), basis, detail=each_of({k: f"{v:.4f}" for k, v in r2.items()})),
        _outcome(
            "model-mae",
            (fmean(score.mae_ips for score in scores.values()),),
            basis,
            detail=each_of({name: f"{score.mae_ips:.2f}" for name, score in scores.items()}),
            reason="An engine of many iterations/s makes a larger error of the same percentage.",
        ),
        _outcome(
            "model-mape",
            (min(mape), max(mape)),
            basis,
            detail=each_of({name: f"{percent(score.mape_seconds)} %" for name, score in scores.items()})
            + f" The profile's own scatter is {percent(ProfilePlan().noise_time)} %.",
        ),
    ]


def _projection(evidence: Evidence) -> list[Outcome]:
    comparison = evidence.engine(4)
    error = comparison.runs["throttllem"].projection_error
    assert error is not None, "throttllem projects"
    noisy = {
        each.name: f"{found.batch * 100:.2f} % and {found.kv * 100:.2f} %"
        for each in evidence.engines_error
        if each.study.model == MAIN_MODEL and (found := each.runs["throttllem"].projection_error)
    }
    basis = (comparison.basis,)
    redone = (
        "The projection in force is redone whenever a request comes or goes, so meeting this figure proves little "
        "and never counts as better."
    )
    with_error = f"Batch and KV with 30 % length error: {each_of(noisy)}"
    return [
        _outcome("projection-batch", (error.batch,), basis, detail=f"{redone} {with_error}"),
        _outcome("projection-kv", (error.kv,), basis, detail=redone),
    ]


def _correlation(evidence: Evidence) -> list[Outcome]:
    found = evidence.correlation
    basis = (
        f"{MAIN_MODEL} TP 4 on {GPU}, top clock, batches of {', '.join(map(str, found.batches))} held while their "
        f"requests grow from one KV block to all that fits, {found.iterations:,} noisy iterations",
    )
    batches = [f"batch {batch}" for batch in found.batches]
    each = [dict(zip(batches, values, strict=True)) for values in (found.tbt, found.throughput)]
    details = [each_of({name: f"{value:.3f}" for name, value in values.items()}) for values in each]
    return [
        _outcome("kv-tbt", (fmean(found.tbt),), basis, detail=details[0]),
        _outcome("kv-throughput", (fmean(found.throughput),), basis, detail=details[1]),
    ]


def _clocks(evidence: Evidence) -> list[Outcome]:
    sweep = evidence.sweep
    basis = (
        f"throttllem estimate --gpu {GPU} --model {MAIN_MODEL} --tp {sweep.tp} --clock {sweep.best_mhz} "
        f"--batch {sweep.batch} --context {sweep.context_tokens}  # and every other clock",
    )
    return [
        _outcome(
            "sweet-spot",
            (sweep.best_mhz, sweep.tpj_gain, sweep.throughput_loss),
            basis,
            detail=f"TP {sweep.tp}, {sweep.batch} requests of {sweep.context_tokens} tokens each.",
        ),
        _outcome(
            "too-low",
            (sweep.best_mhz,),
            basis,
            detail=f"Energy per token is least at {sweep.best_mhz} MHz, {percent(sweep.low_excess)} % more at "
            f"{LOW_MHZ} MHz and {percent(sweep.lowest_excess)} % more at the lowest clock.",
        ),
    ]


def _throttling(evidence: Evidence) -> list[Outcome]:
    found, noisy = evidence.engines, evidence.engines_error
    saved = [each.saved("throttllem") for each in found]
    gained = [each.gained("throttllem") for each in found]
    weakest = min(found, key=lambda each: each.saved("throttllem"))
    words = {
        "violations": slo_violations((*found, *noisy), "throttllem"),
        "reason": draw(weakest, "throttllem"),
        "detail": f"{savings(found, 'throttllem')}{_with_oracle(evidence)} {_FITTED}",
    }
    basis = tuple(each.basis for each in found)
    energy = {**words, "violations": slo_violations(found, "throttllem")}
    with_error = fmean(each.gained("throttllem") for each in noisy)
    four = evidence.engine(4)
    return [
        _outcome("throttle-energy", (fmean(saved), max(saved)), basis, **energy),
        _outcome(
            "throttle-tpj",
            (fmean(gained), max(gained), with_error),
            (*basis, *(each.basis for each in noisy)),
            **{**words, "detail": f"With 30 % length error, energy: {savings(noisy, 'throttllem')} {_FITTED}"},
        ),
        _single(
            "throttle-only-tp4",
            evidence.sizes,
            "throttllem",
            f"TP 4 by itself: {savings((four,), 'throttllem')} {_FITTED}",
        ),
    ]


def _with_oracle(evidence: Evidence) -> str:
    """The mean saving with the paper's predictor, where lengths were predicted by another one."""
    if evidence.engines_oracle == evidence.engines:
        return ""
    mean = fmean(each.saved("throttllem") for each in evidence.engines_oracle)
    return f" With an oracle, as in the paper: {-mean * 100:+.1f} % mean."


def _single(claim_id: str, comparison: Comparison, policy: str, detail: str = "") -> Outcome:
    """A claim on one policy over sizes: energy, and tokens per joule where the claim has that figure too."""
    both = (comparison.saved(policy), comparison.gained(policy))
    sized = time_by_size(comparison, policy) if policy.endswith("+autoscale") else ""
    return _outcome(
        claim_id,
        both[: len(_CLAIMS[claim_id].figures)],
        (comparison.basis,),
        violations=slo_violations((comparison,), policy),
        reason=draw(comparison, policy),
        detail=" ".join(part for part in (sized, detail) if part),
    )


def _autoscaling(evidence: Evidence) -> list[Outcome]:
    return [
        _single("scale-only", evidence.sizes, "triton+autoscale"),
        _single("both-oracle", evidence.sizes_oracle, "throttllem+autoscale", _FITTED),
        _single("both-30", evidence.sizes_error, "throttllem+autoscale", _FITTED),
    ]


def _baseline(evidence: Evidence) -> list[Outcome]:
    comparison = evidence.engine(4)
    run = comparison.baseline
    paper = _CLAIMS["baseline-tpj"].figures[0].paper
    ours_w = run.energy_j / run.duration_s
    detail = (
        f"{ours_w:,.0f} W at {run.requests / run.duration_s:.2f} requests/s, "
        f"{run.generated_tokens / max(1, run.completed):.0f} tokens an answer."
    )
    reason = (
        f"The paper's figure at this load is {ours_w / 4 * run.tokens_per_joule / paper:.0f} W per GPU, ours "
        f"{ours_w / 4:.0f} W: a served run on an A100-80GB SXM drew 280 to 306 W (docs/physics.md), and an engine of "
        "early 2024 may have drawn more, or generated fewer tokens at its maximum load."
    )
    return [_outcome("baseline-tpj", (run.tokens_per_joule,), (comparison.basis,), reason=reason, detail=detail)]


def _slo(evidence: Evidence) -> list[Outcome]:
    every = list(evidence.runs_of("throttllem"))
    e2e = [_meets(run.e2e_s.p99, run.slo.e2e_s) for _, run in every]
    tbt = [_meets(run.tpot_s.p99, run.slo.tbt_s) for _, run in every]
    late = [p99_of(comparison, run) for (comparison, run), met in zip(every, e2e, strict=True) if not met]
    slow = [
        f"{label(comparison, run)} mean TBT p99 {(run.tpot_s.p99 or 0) * 1e3:.0f} ms of "
        f"{(run.slo.tbt_s or 0) * 1e3:.0f} ms"
        for (comparison, run), met in zip(every, tbt, strict=True)
        if not met
    ]
    worse = sum((run.e2e_s.p99 or 0) > (comparison.baseline.e2e_s.p99 or 0) for comparison, run in every)
    sized = [run for _, run in every if run.policy.endswith("+autoscale")]
    words = f"E2E {sum(e2e)} of {len(every)} runs, TBT {sum(tbt)} of {len(every)}"
    found = _outcome(
        "slo",
        (sum(e2e) / len(every), sum(tbt) / len(every)),
        tuple(comparison.basis for comparison in evidence.comparisons),
        words=words,
        reason=f"Violated by {'; '.join((*late, *slow))}.",
        detail=f"E2E p99 above the baseline's in {worse} of {len(every)} runs. "
        f"All runs, {violations([run for _, run in every])} "
        f"With autoscaling, {violations(sized)}",
    )
    return [found]


def _smallest(evidence: Evidence) -> list[Outcome]:
    one, four = evidence.engine(1), evidence.engine(4)
    run = one.baseline
    assert run.e2e_s.p99 is not None and run.slo.e2e_s is not None
    saved = {each.name: each.saved("throttllem") for each in (one, four)}
    text = (
        f"{p99_of(one, run)} at {run.requests / run.duration_s:.2f} requests/s (maximum load "
        f"{one.capacities[1].max_rps:.2f}, {percent(one.capacities[1].rejected)} % of the trace never fits)."
    )
    near = run.e2e_s.p99 / run.slo.e2e_s
    words = f"p99 {near:.2f} of SLO, saves {percent(saved[one.name])} % (TP 4 {percent(saved[four.name])} %)"
    # Where TP 4 saves nothing there is no half of it: TP 1 counts as saving as much.
    share = saved[one.name] / saved[four.name] if saved[four.name] > 0 else 1.0
    reason = f"throttllem saves {percent(saved[one.name])} % at TP 1 and {percent(saved[four.name])} % at TP 4."
    return [_outcome("tp1", (near, share), (one.basis, four.basis), reason=reason, detail=text, words=words)]


def _ours(evidence: Evidence) -> list[Outcome]:
    found, noisy, sizes = evidence.engines, evidence.engines_error, evidence.sizes
    saved = [each.saved("least-energy") for each in found]
    with_error = fmean(each.saved("least-energy") for each in noisy)
    both = "least-energy+autoscale"
    timed = [run for policy in ("throttllem", "least-energy") for _, run in evidence.runs_of(policy)]
    mean_s = fmean(run.decision_s.mean or 0.0 for run in timed)
    worst_s = max(run.decision_s.p99 or 0.0 for run in timed)
    return [
        _outcome(
            "ours-both-online",
            (sizes.saved("throttllem+autoscale"), sizes.gained("throttllem+autoscale")),
            (sizes.basis,),
            detail=slo_violations((sizes,), "throttllem+autoscale"),
        ),
        _outcome(
            "ours-least-energy",
            (fmean(saved), max(saved), with_error),
            tuple(each.basis for each in (*found, *noisy)),
            detail=" ".join(
                part
                for part in (savings(found, "least-energy"), slo_violations((*found, *noisy), "least-energy"))
                if part
            ),
        ),
        _outcome(
            "ours-least-energy-autoscale",
            (sizes.saved(both), sizes.gained(both)),
            (sizes.basis,),
            detail=f"With 30 % length error: {savings((evidence.sizes_error,), both)} "
            f"{slo_violations((sizes, evidence.sizes_error), both)}".strip(),
        ),
        _outcome(
            "ours-half-load",
            tuple(evidence.sizes_half.saved(policy) for policy in ("triton+autoscale", "throttllem+autoscale", both)),
            (evidence.sizes_half.basis,),
            detail=f"{time_by_size(evidence.sizes_half, both)} {slo_violations((evidence.sizes_half,), both)}".strip(),
        ),
        _outcome(
            "ours-decision-time",
            (mean_s, worst_s),
            tuple(each.basis for each in evidence.comparisons),
            detail="Admission and clock together, measured on this machine while other runs share it.",
        ),
    ]


def _meets(found_s: float | None, slo_s: float | None) -> bool:
    return found_s is not None and (slo_s is None or found_s <= slo_s)
