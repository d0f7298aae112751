"""Parameters and FLOPs beside the paper's Table 1."""

from studies import backbone_complexity


def test_the_counts_beside_table_1_are_those_on_file():
    assert backbone_complexity.main(["--check"]) == 0


def test_the_keras_networks_have_the_parameters_of_table_1():
    assert round(backbone_complexity.keras_mobilenet().parameters / 1e6, 2) == 3.04
    assert round(backbone_complexity.keras_shufflenet().parameters / 1e6, 2) == 4.02
