//! How a run learns: what contradicts itself is refused before anything is loaded, and the plan draws the noise levels.

use kernels::{DType, Device};
use models::adapter::files::read;
use models::weights::Checkpoint;
use proofs::assert_same_bits;

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
        ("[optimizer]\nrate = { floor = 0.1 }", "optimizer.rate.floor"),
        ("[optimizer]\nschedule = \"triangle\"", "triangle"),
        ("[train.timesteps]\ndistribution = \"flux-shift\"\nshift = 3.0", "train.timesteps.shift"),
        ("[train.timesteps]\ndistribution = \"mode\"\nscale = 3.0", "train.timesteps.scale"),
        ("[train.timesteps]\ngamma = 5.0", "train.timesteps.gamma"),
        ("[train.ema]\ndecay = 0.9\n[optimizer]\nkind = \"schedule-free\"", "train.ema.decay"),
        ("[train.ema]\ndecay = 1.5", "train.ema.decay"),
        ("[optimizer.lr_by_module]\n\"ffn.*\" = 1e-5\n\"blocks.*\" = 1e-4", "optimizer.lr_by_module"),
        ("[optimizer]\nlr_high = 1e-4", "optimizer.lr_high"),
        ("[optimizer]\nlr_b_ratio = -4.0", "optimizer.lr_b_ratio"),
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

/// A short run is planned with the warm-up of the real one, of a recipe or of another trainer.
#[test]
fn a_short_trial_is_planned_and_its_warm_up_noted() {
    let desk = Desk::new();
    desk.change("[checkpoint]", "[optimizer]\nwarmup = 50\n[checkpoint]");
    let told = desk.succeed(&PLAN).stderr;
    assert!(told.contains("optimizer.warmup = 50 is longer than the run of 2 steps"), "{told}");
    for like in ["musubi-tuner", "diffusion-pipe", "ai-toolkit", "diffsynth-studio"] {
        let desk = Desk::new();
        desk.change("[train]", &format!("[train]\nlike = \"{like}\""));
        desk.succeed(&PLAN);
    }
}

/// What a preset says today differs from what it said when a run began: the run goes on with what it began with, and its state
/// fits.
#[test]
fn a_resumed_run_keeps_the_preset_that_it_began_with() {
    let desk = Desk::new();
    desk.change("[train]", "[train]\nlike = \"ai-toolkit\"");
    // As an earlier version had it: moments in 32 bits, no average.
    let earlier = "[train.ema]\ndecay = 0.0\n[optimizer]\nkind = \"adamw\"\n";
    desk.change("[checkpoint]", &format!("{earlier}[checkpoint]"));
    desk.succeed(&["train", "recipe.toml"]);
    desk.change(earlier, "");
    desk.change("steps = 2\n", "steps = 4\n");
    desk.succeed(&["train", "recipe.toml", "--resume"]);
    let plan = std::fs::read_to_string(desk.path("run/plan.toml")).unwrap();
    assert!(plan.contains("kind = \"adamw\"\n") && plan.contains("decay = 0.0"), "{plan}");
    // A new run has what the preset says today.
    std::fs::remove_dir_all(desk.path("run")).unwrap();
    desk.succeed(&["train", "recipe.toml"]);
    let plan = std::fs::read_to_string(desk.path("run/plan.toml")).unwrap();
    assert!(plan.contains("kind = \"adamw-8bit\"") && plan.contains("decay = 0.99"), "{plan}");
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
    assert!(bars[0].starts_with("  sigma 0.95 .. 1.00") && told.contains("and of their weight"), "{told}");
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

/// Everything at once: rates by module, a limited norm, a loss and noise levels of their own, an average that files hold.
const ALL: &str = r#"
[train.ema]
decay = 0.5
[train.loss]
kind = "pseudo-huber"
scale = "2c"
c_schedule = "snr"
[train.timesteps]
distribution = "mode"
stratified = true
weighting = "min-snr-velocity"
[optimizer]
lr = 0.01
warmup = 0
lr_b_ratio = 4.0
norm_limit = 0.05
lr_by_module = { "ffn.*" = 0.02 }
[export]
precision = "float32"
"#;

/// Two steps, a resume and two more are four steps, to the bit, averages too; files hold the average, and `export` of the
/// checkpoint gives the same file.
#[test]
fn a_run_with_an_average_goes_on_bit_for_bit() {
    let desk = || {
        let desk = Desk::new();
        desk.change("[checkpoint]", &format!("{ALL}\n[checkpoint]"));
        desk
    };
    let (whole, halted) = (desk(), desk());
    whole.change("steps = 2\n", "steps = 4\n");
    whole.succeed(&["train", "recipe.toml"]);
    halted.succeed(&["train", "recipe.toml"]);
    halted.change("steps = 2\n", "steps = 4\n");
    halted.succeed(&["train", "recipe.toml", "--resume"]);
    let last = "run/checkpoints/step-000004.safetensors";
    let [a, b] = [&whole, &halted].map(|desk| Checkpoint::open(&desk.path(last)).unwrap());
    let averages = a.names().filter(|name| name.ends_with(".average")).count();
    assert!(averages > 20 && a.names().eq(b.names()));
    let tensor = |file: &Checkpoint, name: &str| file.tensor(name, DType::F32, &Device::Cpu).unwrap();
    a.names().for_each(|name| assert_same_bits(name, &tensor(&b, name), &tensor(&a, name)));

    whole.succeed(&["export", last, "again.safetensors", "--precision", "f32"]);
    let own = read(&whole.path("run/adapters/recipe.safetensors")).unwrap();
    let again = read(&whole.path("again.safetensors")).unwrap();
    assert!(own.modules.len() == averages / 2 && own.modules.keys().eq(again.modules.keys()));
    for (module, change) in &own.modules {
        for ((name, own), (_, again)) in change.tensors().into_iter().zip(again.modules[module].tensors()) {
            let name = format!("{module}.{name}.weight");
            assert_same_bits(&name, again, own);
            assert_same_bits(&name, own, &tensor(&a, &format!("{name}.average")));
            let trained = tensor(&a, &format!("{name}.parameter"));
            assert!(
                (trained - own).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() > 0.0
            );
        }
    }
}
