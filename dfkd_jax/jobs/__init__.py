"""The jobs of a run: distillation, training on real data, and a check of the teacher."""
