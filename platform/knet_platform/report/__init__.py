"""The ablation table and its page, from the results in the store (no tracking server needed)."""

from knet_platform.report.files import FORMATS, write_report
from knet_platform.report.render import Terminal
from knet_platform.report.table import Report, build_report

__all__ = ["FORMATS", "Report", "Terminal", "build_report", "write_report"]
