"""Answers: benchmarks with their limits and their peers in the same run. Uses only public names of the other layers."""

from .frame import Case, Question, Report, Row, Sample, Variant, measure

__all__ = ["Case", "Question", "Report", "Row", "Sample", "Variant", "measure"]
