"""`bench convert` on layers that are small."""

import json

import pytest

from bench import cli, convert


def test_the_table_and_the_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "HIDDEN", 64)
    monkeypatch.setattr(convert, "HEAD_ROWS", 64)
    monkeypatch.setattr(convert, "LAYERS", {"mlp.down_proj": (256, 128)})
    (tmp_path / "work").mkdir()
    arguments = ["convert", "--quick", "--out", tmp_path / "out", "--dir", tmp_path / "work"]
    assert cli.main(list(map(str, arguments))) == 0
    assert "gptq -> compressed-tensors" in capsys.readouterr().out
    assert not any((tmp_path / "work").iterdir())
    for path in (tmp_path / "out").rglob("convert-quick.json"):
        result = json.loads(path.read_text())
        assert set(result["from_gptq_to"]) == set(convert.TARGETS)
        marlin = result["from_gptq_to"]["marlin"]
        assert marlin["bytes_written"] == 2 * (64 * 64 * 2 + 128 * (256 // 2 + 2 * 2))
        assert marlin["peak_own_bytes"] > 0 and marlin["seconds"] > 0


def test_a_wrong_result_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "LAYERS", {"mlp.down_proj": (256, 128)})
    monkeypatch.setattr(convert, "HIDDEN", 64)
    for name in ("a", "b"):  # two different random checkpoints
        convert.write_source(tmp_path / name, 2)
    convert.check(tmp_path / "a", tmp_path / "a")
    with pytest.raises(AssertionError):
        convert.check(tmp_path / "a", tmp_path / "b")
