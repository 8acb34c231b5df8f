import io
import json

import pytest
from rich.console import Console

from ray_ensemble.errors import InputError
from ray_ensemble.report import terminal_summary


def printed(folder, width=120, color=None):
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=color is not None, color_system=color).print(
        terminal_summary(folder)
    )
    return stream.getvalue()


def test_it_says_what_issue_2_asks_for(run_folder):
    text = printed(run_folder)
    metrics = json.loads((run_folder / "metrics.json").read_text())
    for task, variants in metrics["tasks"].items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"{task} ")]
        for variant in ("base", "qlora_all", "ensemble"):
            assert f"{variants[variant]['loss']:.3f} [" in row
            assert f"{100 * variants[variant]['accuracy']:.1f}% [" in row
        assert " 60 " in row
    assert f"{metrics['mean']['ensemble']['loss']:.3f}" in text
    assert "mean of 8" in text
    assert "the ensemble is better" in text
    assert "higher loss on    stance (+" in text
    assert "group-2  hate, irony, offensive" in text
    assert "1.14 × one QLoRA on all = gradients 0.11 + search <0.01 + training 0.97" in text
    assert "training 10 min 11 s" in text
    assert "2.4 GiB" in text


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_it_fits_and_cuts_no_figure(run_folder, width):
    text = printed(run_folder, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    assert ("\n            " in text) or width >= 120
    found = json.loads((run_folder / "metrics.json").read_text())["tasks"]["sst2"]["ensemble"]["loss_interval"]
    assert f"[{found[0]:.2f}–{found[1]:.2f}]" in text


def test_the_path_of_the_report_is_whole(run_folder):
    assert "not written yet" in printed(run_folder)
    path = run_folder / "report.html"
    path.touch()
    assert str(path) in printed(run_folder, 40).replace("\n", "")


def test_names_from_data_are_neither_markup_nor_control_codes(run_of):
    text = printed(run_of(groups=[["[bold red]x[/]", "a\x1b[2Jb"], ["x" * 99]], n=5))
    assert "[bold red]x[/]" in text
    assert "\x1b" not in text
    assert "x" * 25 not in text


def test_the_best_of_the_three_is_bold(run_folder):
    row = next(line for line in printed(run_folder, color="standard").splitlines() if line.startswith("stance"))
    joint = json.loads((run_folder / "metrics.json").read_text())["tasks"]["stance"]["qlora_all"]
    assert f"\x1b[1m{joint['loss']:.3f}" in row
    assert row.count("\x1b[1m") == 2


def test_many_datasets_are_cut_to_the_extremes_and_it_says_so(run_of):
    text = printed(run_of(groups=[[f"t{i}" for i in range(40)], [f"u{i}" for i in range(30)]], n=4))
    assert "60 of 70 datasets" in " ".join(text.split())
    assert sum(line.startswith(("t", "u")) for line in text.splitlines()) >= 60


def test_what_was_not_measured_is_told(run_folder):
    path = run_folder / "metrics.json"
    metrics = json.loads(path.read_text())
    for key in ("flops", "seconds", "peak_memory_bytes", "paired"):
        del metrics[key]
    path.write_text(json.dumps(metrics))
    text = printed(run_folder)
    for words in ("not counted", "not kept", "not measured", "no paired interval"):
        assert words in text


def test_a_stage_that_found_all_it_needed_in_files_has_no_peak_memory(run_folder):
    path = run_folder / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["peak_memory_bytes"]["ensemble"] = 0
    path.write_text(json.dumps(metrics))
    peaks = " ".join(printed(run_folder, 200).split()).partition("peak memory")[2].partition("Report:")[0]
    assert "gradients" in peaks
    assert "ensemble" not in peaks


def test_a_run_that_is_not_finished_is_refused_by_name(run_folder):
    (run_folder / "metrics.json").unlink()
    with pytest.raises(InputError, match=r"metrics\.json"):
        terminal_summary(run_folder)


def test_boosting_steps_are_one_line_each(boosted_folder, run_folder):
    text = " ".join(printed(boosted_folder, 200).split())
    assert (
        "booster-0 group-0: training loss 0.913 → 0.752, validation loss 0.887 → 0.841; used by 1 of 2 datasets" in text
    )
    assert "booster-1 group-1: training loss – → –, validation loss – → –; left out" in text
    assert "Boosting" not in printed(run_folder)


def test_the_router_is_told_beside_the_known_dataset(routed_folder, run_folder):
    text = printed(routed_folder)
    mean = json.loads((routed_folder / "metrics.json").read_text())["mean"]
    assert "94.1% of test texts" in text
    assert "73.1% accuracy with the picked dataset's prompt" in text
    assert f"{mean['routed']['loss']:.3f}, {mean['ensemble']['loss']:.3f} where it is known" in text
    assert "is not known" not in printed(run_folder)


def test_macro_f1_and_calibration_are_told_where_they_were_measured(run_folder):
    path = run_folder / "metrics.json"
    metrics = json.loads(path.read_text())
    mean = metrics["mean"]
    line = f"one QLoRA {100 * mean['qlora_all']['macro_f1']:.1f}% ["
    assert line in printed(run_folder, 200)
    assert f"ensemble {100 * mean['ensemble']['ece']:.1f}% [" in printed(run_folder, 200)
    for each in mean.values():
        del each["macro_f1"], each["ece"]
    path.write_text(json.dumps(metrics))
    assert "Means over datasets" not in printed(run_folder, 200)
