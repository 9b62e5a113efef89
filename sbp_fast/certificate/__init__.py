"""The equivalence certificate: what it says, and what :func:`sbp_fast.verify` computes it with."""

from .certificate import Broken, Certificate, ParameterError, TotalError

__all__ = ["Broken", "Certificate", "ParameterError", "TotalError"]
