"""The table of the published command line is complete, and every flag it names exists."""

import inspect
import re
from pathlib import Path

from qleak.plans.lens import ARMS, lens

DOC = (Path(__file__).parent.parent / "docs" / "synthesis.md").read_text(encoding="utf-8")
# Every DEFINE_… of main.py at the revision that was read.
FLAGS = """
epoch g_epoch learning_rate beta1 train_size batch_size input_height input_width output_height output_width dataset
checkpoint_dir checkpoint_name data_dir sample_dir train pretrain load_d crop orders proj_mat z_dim y_dim tanh
random_proj simple_gan mean_kernel signsgd signsgd_nothresh klevelsgd sketchsgd signsgd_dept stochastic
pretrain_teacher save_vote pca non_private increasing_dim wgan small sigma sigma_thresh pca_sigma step_size delta
g_step d_step pca_dim thresh max_eps max_grad random_label shuffle save_epoch batch_teachers teachers_batch topk
klevel teacher_dir generator_dir loss ae train_ae finetune_ae sample_step hid_dim
"""
PUBLISHED = FLAGS.split()
DEAD = {"g_epoch", "small", "generator_dir", "sample_step"}


def table(text):
    """Published flag → what stands beside it."""
    lines = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    return {flag: here for flags, here in lines for flag in re.findall(r"`([a-z0-9_]+)`", flags)}


def rows():
    return table(DOC[DOC.index("## The published command line") :])


def test_every_published_flag_has_its_place_and_none_is_invented():
    assert len(PUBLISHED) == len(set(PUBLISHED)) == 66
    assert set(rows()) == set(PUBLISHED)
    assert set(table("| `a` `b` | x |\n| `c` | y |")) == {"a", "b", "c"}


def test_the_dead_ones_are_called_so():
    assert {flag for flag, here in rows().items() if "dead in the original" in here} == DEAD


def test_what_the_table_names_exists():
    known = {f"--{name.replace('_', '-')}" for name in inspect.signature(lens).parameters} | {"--out", "--name"}
    for flag, here in rows().items():
        for named in re.findall(r"`(--[a-z0-9-]+)", here):
            assert named in known, flag
        for arm in re.findall(r"--aggregate (\w+)", here):
            assert arm in ARMS, flag
    assert "--nothing" not in known
