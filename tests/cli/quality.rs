//! `bench quality`, and the settings of int8 arithmetic.

use std::fs;

use serde_json::Value;

use crate::desk::Desk;
use crate::machines::objects;

/// Layers, velocities, gradients and whole runs, on the project's own model and clips; the file has what was printed.
#[test]
fn quality_is_measured_on_a_projects_own_model_and_clips() {
    let desk = Desk::new();
    let words =
        ["--json", "bench", "quality", "recipe.toml", "--items", "1", "--seeds", "2", "--scratch", "."];
    // Enough tokens that layers multiply integers.
    desk.change("[[16, 16]]", "[[64, 64]]");
    let told = desk.succeed(&[&words[..], &["--output", "figures.json"]].concat());
    let figures = objects(&told.stdout).pop().unwrap();
    let file: Value = serde_json::from_str(&fs::read_to_string(desk.path("figures.json")).unwrap()).unwrap();
    assert_eq!(file, figures);
    let network = &figures["networks"][0];
    assert_eq!(network["samples"], 9);
    let (mean, worst) = (&network["layers"]["mean"], &network["layers"]["worst"]);
    for of in ["y", "dx"] {
        let deviation = mean[of].as_f64().unwrap();
        assert!((0.001..0.1).contains(&deviation), "{of} of int8 is off by {deviation}: {network}");
    }
    assert!(worst.as_array().unwrap().len() > 2, "{network}");
    let cosine = network["velocities"]["mean_cosine"].as_f64().unwrap();
    assert!((0.99..1.0).contains(&cosine), "{network}");
    assert!(network["gradients"]["worst"].as_str().unwrap().contains("lora_"), "{network}");
    let runs = figures["training"]["runs"].as_array().unwrap();
    assert!(
        runs.len() == 2 && runs.iter().all(|run| run["losses"].as_array().unwrap().len() == 3),
        "{runs:?}"
    );
}

#[test]
fn arithmetic_and_storage_that_do_not_go_together_are_refused() {
    let desk = Desk::new();
    let both = ["--set", "model.arithmetic=int8", "--set", "model.base=fp8"];
    desk.refuse(&[&["plan", "recipe.toml"][..], &both].concat(), &["model.arithmetic", "\"int8\""]);
    let told = desk.succeed(&["plan", "recipe.toml", "--set", "model.arithmetic=int8"]);
    assert!(
        told.stdout.contains("base = \"int8\"") && told.stdout.contains("arithmetic = \"int8\""),
        "{told:?}"
    );
}
