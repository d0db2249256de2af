"""Results on disk: whole files only, and scores that resume."""

from u2a_fast.store.budget import read_budget, write_budget
from u2a_fast.store.files import lock_folder, read_json, sha256_of_files, write_atomically, write_text
from u2a_fast.store.gradients import GradientShards
from u2a_fast.store.journal import Journal
from u2a_fast.store.scores import ScoreSummary, check_target, read_scores, score_to_parquet, write_scores
from u2a_fast.store.selections import read_selection, write_selection

__all__ = [
    "GradientShards",
    "Journal",
    "ScoreSummary",
    "check_target",
    "lock_folder",
    "read_budget",
    "read_json",
    "read_scores",
    "read_selection",
    "score_to_parquet",
    "sha256_of_files",
    "write_atomically",
    "write_budget",
    "write_scores",
    "write_selection",
    "write_text",
]
