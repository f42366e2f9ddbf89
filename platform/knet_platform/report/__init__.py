"""The ablation table and its page, from the results in the store (no tracking server needed)."""

from knet_platform.report.files import write_report
from knet_platform.report.render import FORMATS, terminal
from knet_platform.report.table import Report, build_report

__all__ = ["FORMATS", "Report", "build_report", "terminal", "write_report"]
