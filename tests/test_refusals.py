

def test_a_dry_run_says_whether_it_counts_classes(tmp_path):
    for overrides, said in ((["data.classes=10"], False), ([], True)):
        text = estimate.describe(load_recipe(write_recipe(tmp_path), overrides), torch.device("cpu"), tflops=1.0)
        assert ("without classes" in text) is said
