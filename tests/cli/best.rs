//! `tandem best` ranks what a run has saved, and the report comes with every run.

use crate::desk::Desk;

#[test]
fn checkpoints_are_ranked_by_their_held_out_loss() {
    let desk = Desk::new();
    desk.change("[data]", "[data]\nheld_out = [\"b*\"]");
    desk.change(
        "[train]\nsteps = 2",
        "[train]\nsteps = 6\neval_every = 2\n[optimizer]\nlr = 0.02\nwarmup = 0",
    );
    desk.succeed(&["train", "recipe.toml"]);
    let page = std::fs::read_to_string(desk.path("run/report.html")).unwrap();
    assert!(page.contains("ended: step 6 of 6") && page.matches("<svg").count() >= 5, "{page}");
    assert!(
        !page.contains("http://")
            || page.matches("http://").count() == page.matches("http://www.w3.org/2000/svg").count()
    );

    let told = desk.succeed(&["best", "run", "--json"]).stdout;
    let object: serde_json::Value = serde_json::from_str(told.lines().last().unwrap()).unwrap();
    let steps = object["steps"].as_array().unwrap();
    let losses: Vec<f64> = steps.iter().map(|one| one["held_out"][0].as_f64().unwrap()).collect();
    assert!(losses.len() == 3 && losses.is_sorted(), "{steps:?}");
    assert_eq!(steps[0]["is_near_best"], true);
    let log = std::fs::read_to_string(desk.path("run/metrics.jsonl")).unwrap();
    let rows = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let measured =
        rows.filter(|row| row["step"] == steps[0]["step"]).find_map(|row| row["eval_loss"].as_f64());
    assert_eq!(measured, Some(losses[0]));
    let files = |one: &serde_json::Value| one["adapters"].as_array().unwrap().len();
    assert!(steps.iter().all(|one| files(one) == 1 && one["checkpoint"].is_string()), "{steps:?}");

    let of = |step: u64| format!("run/checkpoints/step-{step:06}.safetensors");
    let both = [of(4), of(6)];
    let output = ["--output", "mean.safetensors", "--precision", "f32"];
    desk.succeed(&[&["average", &both[0], &both[1]], &output[..]].concat());
    desk.refuse(
        &["average", &both[0], &both[1], "--output", "other.safetensors", "--weights", "1"],
        &["1 numbers for 2"],
    );
    let read = |name: &str| kernels::safetensors::load(desk.path(name), &kernels::Device::Cpu).unwrap();
    for (step, name) in [(4, "four.safetensors"), (6, "six.safetensors")] {
        desk.succeed(&["export", &of(step), name, "--precision", "f32"]);
    }
    let (mean, four, six) = (read("mean.safetensors"), read("four.safetensors"), read("six.safetensors"));
    for (name, tensor) in &mean {
        let half = |tensor: &kernels::Tensor| (tensor * 0.5).unwrap();
        let expected = (half(&four[name]) + half(&six[name])).unwrap();
        let far = (tensor - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        // Scales are multiplied into the factors of a file: a rounding each.
        assert!(far < 1e-6, "{name}: {far}");
    }

    let text = desk.succeed(&["best", "run"]).stdout;
    assert!(text.contains("held-out loss") && text.contains("report.html"), "{text}");
    desk.refuse(&["best", "clips"], &["plan.toml"]);
}

#[test]
fn a_run_that_nobody_trains_is_told_nothing() {
    let desk = Desk::new();
    desk.refuse(&["tell", "run", "stop"], &["no process trains a run in run"]);
    desk.succeed(&["train", "recipe.toml"]);
    desk.refuse(&["tell", "run", "lr=1e-4"], &["no process trains a run in run"]);
    desk.refuse(
        &["tell", "run", "faster"],
        &["a run can be told sample, save, stop, pause, continue or lr=5e-5"],
    );
    desk.refuse(&["tell", "run", "lr=-1"], &["\"-1\" is no learning rate"]);
}
