"""Golden outputs of the official implementations under deterministic weights, and the recipe for those weights."""
