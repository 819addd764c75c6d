"""What train.py chooses by itself: the precision, and what is computed again for the gradient."""
import pytest
import tiny
import torch

import train
from tinytav import cli, memory, tuning
from tinytav.errors import InputError

GONE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def run_train(place, monkeypatch, *options):
    """train.py in this process -> its net and exit status."""
    monkeypatch.chdir(place)
    argv = ["train.py", "clip.mp4", "a man is skiing", "--weights", "w", "--steps", "1", *options]
    monkeypatch.setattr("sys.argv", argv)
    nets = []
    plain = tuning.Tuner.step

    def step(tuner):
        nets.append(tuner.net)
        return plain(tuner)
    with monkeypatch.context() as patch:
        patch.setattr(tuning.Tuner, "step", step)
        status = train.main()
    return nets[0], status


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    tiny.write_folder(place / "w")
    tiny.write_clip(place / "clip.mp4")
    return place


def test_checkpointing_is_what_memory_needs_unless_the_flag_says_otherwise(place, monkeypatch, capsys):
    net, _ = run_train(place, monkeypatch)
    assert memory.recomputed(net) == 0 and "computed again" not in capsys.readouterr().out
    net, _ = run_train(place, monkeypatch, "--checkpointing", "on")
    assert memory.recomputed(net) == len(memory.blocks(net)) == 12
    assert "12 of 12 blocks are computed again for the gradient" in capsys.readouterr().out


def test_too_little_memory_is_a_warning_and_the_run_is_made(place, monkeypatch, recwarn):
    monkeypatch.setattr(memory, "free_bytes", lambda: 1e6)
    net, status = run_train(place, monkeypatch)
    assert status == 0 and memory.recomputed(net) == 12
    assert any("A step of tuning needs about" in str(warning.message) for warning in recwarn)
    net, status = run_train(place, monkeypatch, "--checkpointing", "off")
    assert status == 0 and memory.recomputed(net) == 0


def test_memory_that_runs_out_is_survived_unless_checkpointing_is_off(place, monkeypatch):
    def fail_once():
        failures = [GONE]
        monkeypatch.setattr(tuning, "draw", lambda *args: raise_(failures.pop()) if failures else plain(*args))
    plain = tuning.draw
    fail_once()
    with pytest.warns(UserWarning, match="The memory is too small for a step"):
        net, status = run_train(place, monkeypatch)
    assert status == 0 and memory.recomputed(net) > 0
    fail_once()
    with pytest.raises(torch.OutOfMemoryError):
        run_train(place, monkeypatch, "--checkpointing", "off")


def raise_(error):
    raise error


# ---- Precision -----------------------------------------------------------------------------------

@pytest.mark.parametrize("able, dtype", [
    (dict(avx512_bf16=True), torch.bfloat16), (dict(amx_bf16=True), torch.bfloat16),
    (dict(avx512=True), torch.float32)])
def test_a_cpu_that_has_bf16_uses_it_unless_told_otherwise(monkeypatch, able, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    cpu = torch.device("cpu")
    assert cli.choose_dtype(cpu) is dtype
    assert cli.choose_dtype(cpu, "fp32") is torch.float32 and cli.choose_dtype(cpu, "fp16") is torch.float16


def test_the_weights_may_ask_for_a_precision_and_the_flag_decides(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "cpu_has_bf16", lambda: True)
    path = tiny.write_folder(tmp_path / "w")
    parser = cli.parser("")

    def dtype(*flags):
        return cli.load_weights(parser.parse_args(["--weights", str(path), "--device", "cpu", *flags])).dtype
    assert dtype() is torch.float32 and "precision" not in capsys.readouterr().out
    assert dtype("--precision", "bf16") is torch.bfloat16
    (path / "defaults.json").unlink()
    assert dtype() is torch.bfloat16 and "--precision fp32 undoes it" in capsys.readouterr().out
    assert dtype("--precision", "fp32") is torch.float32
    tiny.save_json(path / "defaults.json", dict(precision="fp8"))
    with pytest.raises(InputError, match="precision = 'fp8'"):
        dtype()
