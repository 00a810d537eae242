//! Absurd numbers in a recipe are refused with their key, and no number makes `plan` panic or run out of memory.

use proofs::project::Project;
use trainer::plan::Plan;

/// Every key of a recipe that takes a number, as `section.key`, or as a list or table that holds it.
const WHOLE: [&str; 29] = [
    "run.seed",
    "data.windows",
    "data.stride",
    "data.sizes = [[#, 32]]",
    "data.frames = [#]",
    "data.repeats = { \"*\" = # }",
    "adapter.rank",
    "adapter.factor",
    "train.steps",
    "train.epochs",
    "train.batch",
    "train.accumulate",
    "train.tokens_per_step",
    "train.eval_every",
    "optimizer.warmup",
    "optimizer.rate.cycles",
    "optimizer.rate.timescale",
    "optimizer.rate.phases",
    "devices.split = [#]",
    "devices.split = [#, 2]",
    "memory.ffn_tokens",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.keep_last",
    "sample.every",
    "sample.steps",
    "sample.frames",
    "sample.size = [#, 32]",
    "sample.seed",
];
const REAL: [&str; 31] = [
    "data.fps",
    "data.source_fps",
    "data.picture_folder_fps",
    "adapter.alpha",
    "adapter.dropout",
    "train.caption_dropout",
    "train.timesteps.shift",
    "train.timesteps.scale",
    "train.timesteps.mean",
    "train.timesteps.std",
    "train.timesteps.min",
    "train.timesteps.max",
    "train.timesteps.alpha",
    "train.timesteps.gamma",
    "train.loss.c",
    "optimizer.rate.floor",
    "optimizer.lr_b_ratio",
    "optimizer.lr_high",
    "optimizer.norm_limit",
    "train.ema.decay",
    "train.prior.weight",
    "train.prior.share",
    "optimizer.rate.power",
    "optimizer.rate.warmup_start",
    "optimizer.lr",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "sample.strength",
    "sample.guidance",
    "sample.shift",
];
const LARGE: [&str; 7] =
    ["0", "1", "65536", "2147483648", "4294967295", "1000000000000", "9223372036854775807"];
const ODD: [&str; 9] = ["0.0", "-1.0", "1e-300", "1e-12", "0.5", "1e9", "1e308", "inf", "nan"];
const PROMPTS: [&str; 6] = ["--w #", "--h #", "--f #", "--s #", "--w # --h #", "--d #"];

/// The recipe of `project` with a setting more.
fn with(recipe: &str, section: &str, line: &str) -> String {
    let head = format!("[{section}]");
    match recipe.contains(&head) {
        true => recipe.replacen(&head, &format!("{head}\n{line}"), 1),
        false => format!("{recipe}\n{head}\n{line}\n"),
    }
}

#[test]
fn no_number_of_a_recipe_makes_plan_panic() {
    let project = Project::new(&proofs::fixture(""), &["a ball"], "[sample]\nprompts = [\"a ball\"]\n");
    let recipe = std::fs::read_to_string(project.recipe()).unwrap();
    let mut cases = Vec::new();
    for (keys, values) in [(&WHOLE[..], &LARGE[..]), (&REAL[..], &ODD[..])] {
        for (key, value) in keys.iter().flat_map(|key| values.iter().map(move |value| (key, value))) {
            let (name, line) = key.split_once(" = ").unwrap_or((key, "#"));
            let (section, name) = name.rsplit_once('.').unwrap();
            let recipe = match name {
                "sizes" => recipe.replace("sizes = [[48, 32]]", ""),
                "frames" if section == "data" => recipe.replace("frames = [5]", ""),
                _ => recipe.clone(),
            };
            let extract = match name {
                "windows" => "extract = \"uniform\"\n",
                "stride" => "extract = \"sliding\"\n",
                "factor" => "kind = \"lokr\"\n",
                _ => "",
            };
            let line = format!("{extract}{name} = {}", line.replace('#', value));
            cases.push((format!("{key} of {value}"), name, with(&recipe, section, &line)));
        }
    }
    for (options, value) in PROMPTS.iter().flat_map(|options| LARGE.iter().map(move |value| (options, value)))
    {
        let prompt = format!("a ball {}", options.replace('#', value));
        cases.push((prompt.clone(), "clip", recipe.replace("\"a ball\"", &format!("\"{prompt}\""))));
    }
    let mut refused = 0;
    for (what, name, recipe) in &cases {
        std::fs::write(project.recipe(), recipe).unwrap();
        if let Err(error) = Plan::make(&project.recipe(), &mut |_, _| {}) {
            let told = error.to_string();
            assert!(
                [name, "clip", "prompt line", "sampling steps", "tiny.toml"]
                    .iter()
                    .any(|words| told.contains(words)),
                "{what}: {told}"
            );
            refused += 1;
        }
    }
    assert!(refused > cases.len() / 3 && refused < cases.len(), "{refused} of {} refused", cases.len());
}

#[test]
fn a_number_beyond_its_bound_is_refused_with_key_and_bound() {
    let project = Project::new(&proofs::fixture(""), &["a ball"], "");
    let recipe = std::fs::read_to_string(project.recipe()).unwrap();
    for (section, line, told) in [
        ("train", "accumulate = 10001", ["train.accumulate", "10000"]),
        ("adapter", "rank = 16385", ["adapter.rank", "16384"]),
        ("sample", "steps = 10001", ["sample.steps", "10000"]),
        ("checkpoint", "keep_last = 10001", ["checkpoint.keep_last", "10000"]),
        ("data", "repeats = { \"*\" = 10001 }", ["data.repeats", "10000"]),
        ("sample", "prompts = [\"x --w 8192 --h 8192 --f 81\"]", ["width x height x frames", "2147483648"]),
    ] {
        std::fs::write(project.recipe(), with(&recipe, section, line)).unwrap();
        let error = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap_err().to_string();
        assert!(told.iter().all(|words| error.contains(words)), "{line}: {error}");
    }
}
