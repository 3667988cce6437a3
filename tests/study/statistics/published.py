"""Worked examples from print, and where they stand."""

from __future__ import annotations

# Hours of sleep gained with two drugs: Cushny & Peebles (1905), in Student, "The Probable Error of a Mean",
# Biometrika 6 (1908). R has the data as `sleep`; its paired t.test prints t = -4.0621, df = 9,
# p-value = 0.002833, 95 % interval -2.4598858 to -0.7001142, mean of the differences -1.58.
SLEEP_FIRST = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
SLEEP_SECOND = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)

# Darwin's fifteen pairs of Zea mays, crossed minus self-fertilised, in eighths of an inch: R. A. Fisher, The
# Design of Experiments (1935), sections 17 and 21: t = 2.148; of the 32,768 patterns of signs 863 have a sum
# of at least the observed 314.
ZEA_MAYS = (49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48)

# The pilot plant of Box, Hunter & Hunter, Statistics for Experimenters, 2nd edition (2005), chapter 5: yield
# by temperature T, concentration C and catalyst K (T fastest), each run made twice.
PILOT_PLANT = ((59, 61), (74, 70), (50, 58), (69, 67), (50, 54), (81, 85), (46, 44), (79, 81))
PILOT_PLANT_EFFECTS = {
    "T": 23.0,
    "C": -5.0,
    "K": 1.5,
    "T x C": 1.5,
    "T x K": 10.0,
    "C x K": 0.0,
    "T x C x K": 0.5,
}

# Fifteen p values of Neuhaus et al. (1992) in Benjamini & Hochberg, J. R. Statist. Soc. B 57 (1995), section
# 4. Bonferroni's procedure rejects the first three at 0.05; Holm's rejects at least those.
NEUHAUS = (
    *(0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344),
    *(0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0000),
)

# The example of Holm's adjustment in the documentation of Julia's MultipleTesting.
HOLM_BEFORE, HOLM_AFTER = (0.001, 0.01, 0.03, 0.5), (0.004, 0.03, 0.06, 0.5)

# Two films rated by the same ten people: Lakens, "Calculating and reporting effect sizes to facilitate
# cumulative science", Frontiers in Psychology 4:863 (2013): t(9) = 4.74, p = .001, 95 % interval 0.52 to
# 1.48, d_z = 1.50.
FILM_FIRST = (9, 7, 8, 9, 8, 9, 9, 10, 9, 9)
FILM_SECOND = (9, 6, 7, 8, 7, 9, 8, 8, 8, 7)
