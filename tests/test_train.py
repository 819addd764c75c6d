"""What train.py does when memory is short."""
import re

import pytest
import tiny
import torch
from test_tuning import make_tuner

import train
from tinytav import cli, tuning
from tinytav.errors import InputError
from tinytav.measure import fit, memory

GONE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def recomputed(net):
    return [name for name, block in memory.checkpointable(net).items() if block.checkpointing]


@pytest.mark.parametrize("moment", ["loss", "gradient"])
def test_a_step_for_which_memory_runs_out_is_made_again_with_all_blocks_recomputed(moment):
    tuner, calm, said = make_tuner(), make_tuner(), []
    failures = [GONE]

    def fails(*anything):
        if len(tuner.losses) == 1 and failures:
            raise failures.pop()

    if moment == "loss":
        tuner.net.conv_out.register_forward_pre_hook(fails)
    else:                                                   # some gradients are there already, and must not count twice
        next(iter(tuner.parameters.values())).register_hook(fails)
    for _ in range(3):
        train.make_step(tuner, said.append)
        calm.step()
    assert recomputed(tuner.net) == list(memory.checkpointable(tuner.net))
    assert len(said) == 1 and "too small for step 2" in said[0]
    assert tuner.losses == calm.losses
    for name, p in calm.parameters.items():
        assert torch.equal(p, tuner.parameters[name]), name


def test_memory_that_runs_out_although_all_is_recomputed_is_the_end(monkeypatch):
    tuner = make_tuner()
    tuner.net.conv_out.register_forward_pre_hook(lambda *anything: raise_(GONE))
    with pytest.raises(torch.OutOfMemoryError):
        train.make_step(tuner, print)
    assert recomputed(tuner.net) == list(memory.checkpointable(tuner.net))
    with pytest.raises(torch.OutOfMemoryError):
        train.make_step(tuner, print)


def raise_(error):
    raise error


def run_train(place, monkeypatch, *options):
    """train.py in this process -> its net and exit status."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["train.py", "clip.mp4", "a man is skiing", "--weights", "w", "--steps", "1", *options])
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
    assert recomputed(net) == [] and "computed again" not in capsys.readouterr().out
    net, _ = run_train(place, monkeypatch, "--checkpointing", "on")
    assert recomputed(net) == list(memory.checkpointable(net))
    assert re.search(r"a step of tuning needs 0\.\d\d GiB of memory; for that 12 of 12 blocks are computed again",
                     capsys.readouterr().out)


def test_too_little_memory_is_a_warning_and_the_run_is_made(place, monkeypatch, recwarn):
    monkeypatch.setattr(fit, "free_bytes", lambda device: 1e6)
    net, status = run_train(place, monkeypatch)
    assert status == 0 and recomputed(net)
    assert any("A step of tuning needs about" in str(warning.message) for warning in recwarn)
    net, status = run_train(place, monkeypatch, "--checkpointing", "off")
    assert status == 0 and recomputed(net) == []


# ---- Precision -----------------------------------------------------------------------------------

@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_that_has_bf16_uses_it_unless_told_otherwise(monkeypatch, native, dtype):
    monkeypatch.setattr(cli, "cpu_has_bf16", lambda: native)
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
