//! How a run learns: what contradicts itself is refused before anything is loaded, and the plan draws the noise levels.

use crate::desk::Desk;

const PLAN: [&str; 2] = ["plan", "recipe.toml"];

/// One sentence with the key, exit code 2, and no run folder: for `plan` and for `train`.
#[test]
fn contradictions_are_refused_before_anything_is_loaded() {
    for (lines, told) in [
        ("[optimizer]\nkind = \"lion\"\nmomentum = 0.9", "optimizer.momentum"),
        ("[optimizer]\nkind = \"prodigy\"", "optimizer.lr"),
        ("[optimizer]\nkind = \"schedule-free\"\nschedule = \"cosine\"", "optimizer.schedule"),
        (
            "[optimizer]\nkind = \"adafactor\"\nrelative_step = true\nschedule = \"linear\"",
            "optimizer.schedule",
        ),
        ("[optimizer]\nkind = \"adamw\"\nd0 = 1e-6", "optimizer.d0"),
        ("[optimizer]\nwarmup = 3", "optimizer.warmup"),
        ("[optimizer]\nrate = { floor = 0.1 }", "optimizer.rate.floor"),
        ("[optimizer]\nschedule = \"triangle\"", "triangle"),
        ("[train.timesteps]\ndistribution = \"flux-shift\"\nshift = 3.0", "train.timesteps.shift"),
        ("[train.timesteps]\ndistribution = \"mode\"\nscale = 3.0", "train.timesteps.scale"),
        ("[train.timesteps]\ngamma = 5.0", "train.timesteps.gamma"),
        ("[train.loss]\nkind = \"l1\"\nc = 0.1", "train.loss.c"),
        ("[train.loss]\nkind = \"hubert\"", "hubert"),
    ] {
        let desk = Desk::new();
        desk.change("[checkpoint]", &format!("{lines}\n[checkpoint]"));
        for command in ["plan", "train"] {
            desk.refuse(&[command, "recipe.toml"], &[told]);
        }
        assert!(!desk.path("run").exists(), "{lines}");
    }
}

/// The bars of the plan are the shares of its JSON, which sum to one for each network.
#[test]
fn a_plan_draws_the_noise_levels() {
    let desk = Desk::new();
    desk.change(
        "[checkpoint]",
        "[train.timesteps]\ndistribution = \"logsnr\"\nmin = 0.2\nweighting = \"bell\"\n[checkpoint]",
    );
    let told = desk.succeed(&PLAN).stdout;
    let bars: Vec<&str> = told.lines().filter(|line| line.starts_with("  sigma 0.")).collect();
    assert_eq!(bars.len(), 16, "{told}");
    assert!(bars[0].starts_with("  sigma 0.95 .. 1.00") && told.contains("what they count for"), "{told}");
    let longest = bars.iter().map(|line| line.matches('\u{2588}').count()).max().unwrap();
    assert!((20..=40).contains(&longest), "{told}");
    let json: serde_json::Value =
        serde_json::from_str(&desk.succeed(&[&["--json"], &PLAN[..]].concat()).stdout).unwrap();
    let levels = json["noise_levels"].as_array().unwrap();
    assert_eq!(levels.len(), 1);
    for list in ["share", "weighted"] {
        let shares = levels[0][list].as_array().unwrap().iter().map(|share| share.as_f64().unwrap());
        assert_eq!(shares.clone().count(), 20);
        assert!((shares.clone().sum::<f64>() - 1.0).abs() < 1e-9 && shares.take(4).all(|share| share == 0.0));
    }
}
