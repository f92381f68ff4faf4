"""The quality bench on a tiny random model: its tables, its arithmetic, its texts."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch

from bench import cli, quality, quality_readme, quality_rows, quality_subject, quality_texts
from bench.quality_judges import LanguageJudge, Score, resampled
from gptq import calibration, grid, solver

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gptq"))
import models


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A language model and an encoder, as people have them."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "bert"):
        models.save(name, folder / name)
    return [str(folder / name) for name in ("llama", "bert")]


debian = pytest.mark.skipif(
    not quality_texts.LICENCES.is_dir(), reason=f"needs Debian's {quality_texts.LICENCES}"
)


@pytest.fixture
def drawn():
    """Calibration samples by their seed."""
    documents = quality_texts.texts("usual").calibration
    return lambda seed: calibration.samples(
        documents, models.tokenizer(), None, 96, seed, tokens=1000
    )


def test_a_quick_run_of_both_kinds(directories, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality_subject, "QUICK_TOKENS", 300)
    monkeypatch.setattr(quality_subject, "SENTENCES", 12)
    argv = ["quality", "--quick", "--models", ",".join(directories), "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    (path,) = tmp_path.glob("*/quality-quick-chosen.json")
    result = json.loads(path.read_text())
    rows = {(row["model"], row["name"]): row for row in result["rows"]}
    for model, measure in (("llama", "nll"), ("bert", "cosine")):
        full, rtn, default, packed = (
            rows[model, name]["domains"]["reference"]
            for name in ("full precision", "RTN", "default", quality_subject.PACKED)
        )
        assert full["delta"] == 0 and rtn["closed"] == 0
        assert default["closed"] == pytest.approx(1 - default["delta"] / rtn["delta"])
        assert packed[measure] == pytest.approx(default[measure], abs=2e-3)
        assert rows[model, "default"]["worse_modules"] == []
        assert rows[model, "default"]["loss_to_rtn"] < rows[model, "published"]["loss_to_rtn"] < 1
    assert rows["llama", "full precision"]["domains"]["docstrings"]["top1"] == 1
    table = capsys.readouterr().out
    assert "llama: 300 tokens of docstrings" in table or "tokens of docstrings" in table
    assert "bert: 12 sentences of reference" in table


def test_no_time_means_no_rows_but_a_result(directories, tmp_path):
    argv = ["quality", "--quick", "--models", directories[1], "--budget", "0.001"]
    assert cli.main([*argv, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/quality-quick-chosen.json")
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["full precision"]


def test_the_judge_scores_as_a_loop_over_tokens_would():
    model, other = models.build("llama"), models.build("llama", seed=1)
    judge = LanguageJudge(
        model, models.tokenizer(), "cpu", quality_texts.texts("usual").judged, 200, 64
    )
    judge.pieces = {"text": [piece[:, :20] for piece in judge.pieces["reference"][:1]]}
    judge.pieces["text"].append(judge.pieces["text"][0][:, :7])  # padded beside the longer one
    score = judge(other)["text"]
    assert score.weight.tolist() == [19, 6]
    for i, piece in enumerate(judge.pieces["text"]):
        nll = kl = top1 = 0.0
        with torch.no_grad():
            ours, theirs = (m(input_ids=piece).logits[0].log_softmax(-1) for m in (other, model))
        for j in range(piece.shape[1] - 1):
            nll -= ours[j, piece[0, j + 1]].item()
            kl += (theirs[j].exp() * (theirs[j] - ours[j])).sum().item()
            top1 += (ours[j].argmax() == theirs[j].argmax()).item()
        found = [score.sums[name][i].item() for name in ("nll", "kl", "top1")]
        assert found == pytest.approx([nll, kl, top1], rel=1e-4)


def test_bootstrap_covers_the_difference():
    generator = torch.Generator().manual_seed(0)
    weight = torch.full((60,), 10.0, dtype=torch.float64)
    base = torch.randn(60, generator=generator, dtype=torch.float64)
    shift = 2 + torch.randn(60, generator=generator, dtype=torch.float64)
    low, high = resampled(Score(weight, {"nll": base + shift}), Score(weight, {"nll": base}), "nll")
    # A mean of 0.2 with a standard error of 0.1/sqrt(60): the spread of `base` is paired off.
    assert low < shift.mean() / 10 < high
    assert high - low == pytest.approx(4 * 0.1 / 60**0.5, rel=0.25)


def test_rows_start_with_what_tells_most_and_end_with_all_on():
    rows = quality_rows.matrix([64, 32, -1], 24_576, (12_288, 49_152, None))
    assert [row.name for row in rows[:4]] == ["RTN", "published", "plain clip", "default"]
    assert len(rows) == len(set(rows))
    together = [dict(row.options) for row in rows if row.name == "+ refit"]
    default = solver.gptq.__kwdefaults__
    assert all(default[name] == value for name, value in together[0].items() if name != "guard")
    for tokens in (12_288, 24_576, 49_152):
        seeds = {r.seed for r in rows if (r.name, r.tokens) == ("default", tokens)}
        assert seeds == {0, 1, 2}
    assert {row.group_size for row in rows} == {64, 32, -1}


def test_every_group_size_gets_the_three_roundings_each_addition_alone_and_all_together():
    rows = quality_rows.matrix([128, 64, 32, -1], 400, (100, None))
    expected = {"RTN", "RTN full range", "RTN clipped", "published", "plain clip", "default"}
    for group in (128, 64, 32, -1):
        names = {row.name for row in rows if row.group_size == group and row.tokens == 400}
        assert names >= expected | set(quality_rows.ALONE) | set(quality_rows.TOGETHER)
    assert set(quality_rows.PRODUCTS) < {row.name for row in rows if row.group_size == 128}
    # A run that is cut loses single additions of other group sizes before their main rows.
    main = [i for i, row in enumerate(rows) if row.group_size != 128 and row.name in expected]
    alone = [i for i, r in enumerate(rows) if r.group_size != 128 and r.name in quality_rows.ALONE]
    assert max(main) < min(alone)


def test_what_a_row_is_compared_with_comes_before_it():
    rows = quality_rows.matrix([64, 32, -1], 24_576, (12_288, 49_152, None))
    seen, rounded = set(), set()
    for row in rows:
        place = (row.name, *row.settings())
        assert place not in seen
        seen.add(place)
        if row.name == "RTN":
            rounded.add(row.group_size)
        assert row.group_size in rounded
        assert row.method == quality_rows.RTN or ("published", *row.settings()) in seen


def test_every_row_of_the_matrix_quantizes(directories):
    """Each set of options once, in a model that is too small to tell which is better."""
    subject = quality_subject.Subject(directories[1], "cpu", quick=True)
    rows = {
        (row.method, row.options, row.glued, row.rounded_last): row
        for row in quality_rows.matrix([32], 8, (4,))
    }
    assert {row.name for row in rows.values()} > {
        f"{name}, {choice}"
        for name in ("default", "published")
        for choice in (quality_rows.GLUED, quality_rows.ROUNDED_LAST)
    }
    for row in rows.values():
        model, results = subject.quantize(row)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
        assert all(0 < result.loss < 1 for result in results)
        assert bool(results) == (row.method == quality_rows.GPTQ)


def test_the_readme_shows_the_main_rows_whatever_else_was_measured():
    result = json.loads(quality_readme.RESULT.read_text())
    whole = quality_readme.section(result)
    others = [
        {**row, "group_size": group, "name": name}
        for row in result["rows"] if row["name"] == "published"
        for group, name in ((32, "published"), (32, "default"), (-1, "FP16 products"))
    ]  # fmt: skip
    assert quality_readme.section({**result, "rows": result["rows"] + others}) == whole
    few = [row for row in result["rows"] if row["name"] != "plain clip"]
    missing = quality_readme.section({**result, "rows": few})
    assert set(whole.splitlines()) - set(missing.splitlines()) == {
        line for line in whole.splitlines() if "searched scales" in line
    }


@debian
def test_held_out_text_is_held_out():
    usual, other = quality_texts.texts("usual"), quality_texts.texts("other")
    assert sorted(usual.judged["reference"]) == sorted(calibration.pydoc_topics(held_out=True))
    for texts, domains in ((usual, {"reference", "docstrings"}), (other, {"licences", "code"})):
        assert set(texts.judged) == domains and all(texts.judged.values())
        for documents in texts.judged.values():
            assert not set(documents) & set(texts.calibration)
    assert sorted(other.calibration) == sorted(usual.judged["docstrings"])


def test_calibration_is_drawn_by_the_seed(drawn):
    assert sum(piece.numel() for piece in drawn(0)) == 1000
    assert not torch.equal(drawn(0)[0], drawn(1)[0])


def test_glued_documents_are_the_same_tokens_in_windows_of_one_length(drawn):
    pieces = drawn(0)
    windows = quality_texts.glued(pieces, 96)
    assert torch.equal(torch.cat(windows, dim=1), torch.cat(pieces, dim=1))
    assert {window.shape[1] for window in windows[:-1]} == {96}
    assert {piece.shape[1] for piece in pieces[:-1]} != {96}


def test_scales_may_be_rounded_last():
    weight, factor = torch.randn(64, 8), torch.randn(200, 64)
    found = []
    for rounds in (contextlib.nullcontext, quality_subject.scales_rounded_last):
        with rounds():
            scale = grid.absmax_scale(weight)
            found.append(solver.gptq(weight, factor.T @ factor, 32))
        assert torch.equal(scale, scale.half().float()) == (rounds is contextlib.nullcontext)
    assert all(solution.scales.dtype == torch.float16 for solution in found)
    assert not torch.equal(found[0].scales, found[1].scales)
    assert torch.equal(grid.absmax_scale(weight), grid.absmax_scale(weight).half().float())


def test_rows_can_be_chosen(directories, tmp_path, capsys):
    rows = quality_rows.matrix([64, 32], 24_576, (12_288, None))
    glued = f"default, {quality_rows.GLUED}"
    few = quality.wanted(rows, f"RTN; {glued}")
    assert {row.name for row in few} == {"RTN", glued}
    assert {row.seed for row in few if row.glued} == {0, 1, 2}
    assert quality.wanted(rows, None) == rows
    with pytest.raises(ValueError, match="--only: expected names of rows, got 'none'"):
        quality.wanted(rows, "RTN;none")
    argv = ["quality", "--quick", "--models", directories[1], "--out", str(tmp_path)]
    assert cli.main([*argv, "--only", "RTN"]) == 0
    (path,) = tmp_path.glob("*/quality-quick-chosen.json")
    names = [row["name"] for row in json.loads(path.read_text())["rows"]]
    assert names == ["full precision", "RTN"]
    assert cli.main([*argv, "--only", "none"]) == 2
    assert "bench quality: --only: expected" in capsys.readouterr().err


@debian
def test_other_texts_calibrate_and_judge(directories, tmp_path, monkeypatch):
    monkeypatch.setattr(quality_subject, "QUICK_TOKENS", 300)
    monkeypatch.setattr(quality_subject, "SENTENCES", 12)
    argv = ["quality", "--quick", "--texts", "other", "--only", "RTN", "--out", str(tmp_path)]
    assert cli.main([*argv, "--models", ",".join(directories)]) == 0
    (path,) = tmp_path.glob("*/quality-other-texts-quick-chosen.json")
    llama, bert = json.loads(path.read_text())["judged"].values()
    assert set(llama) == {"licences", "code"} and set(bert) == {"licences"}


def test_without_licences_a_line_says_so(directories, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality_texts, "LICENCES", tmp_path / "nothing")
    quality_texts.texts.cache_clear()
    argv = ["quality", "--quick", "--texts", "other", "--models", directories[0]]
    assert cli.main([*argv, "--out", str(tmp_path)]) == 2
    assert "--texts other: expected Debian's" in capsys.readouterr().err
    quality_texts.texts.cache_clear()
