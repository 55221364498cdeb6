"""Files, figures and pages made from an evaluation."""
