//! Recipes as they are written, begun and changed: words of other trainers, `--set`, prompt files, `tandem new`.

use std::fs;

use crate::desk::Desk;

const PLAN: [&str; 2] = ["plan", "recipe.toml"];

/// Setting names of other trainers lead to Tandem's, in the same section or in another.
#[test]
fn words_of_other_trainers_are_translated() {
    for (place, theirs, told) in [
        ("[adapter]", "network_dim = 32", "`network_dim` is adapter.rank here"),
        ("[train]", "learning_rate = 1e-4", "`learning_rate` is optimizer.lr here"),
        ("[train]", "lr = 1e-4", "`lr` is a key of another section: optimizer.lr"),
        ("[train]", "gradient_accumulation_steps = 4", "train.accumulate"),
        ("[train]", "blocks_to_swap = 20", "memory.offload"),
        ("[data]", "resolution = 512", "data.sizes"),
        ("[data]", "num_repeats = 3", "data.repeats"),
        ("[run]", "output_dir = \"out\"", "run.folder"),
        ("[model]", "fp8_base = true", "base = \"fp8\""),
    ] {
        let desk = Desk::new();
        desk.change(place, &format!("{place}\n{theirs}"));
        desk.refuse(&PLAN, &["recipe.toml", told]);
        assert!(!desk.run(&PLAN).stderr.contains("did you mean"), "{theirs}");
    }
}

#[test]
fn a_word_like_none_of_ours_is_not_guessed_at() {
    let desk = Desk::new();
    desk.change("[train]", "[train]\nxyzzy = 1");
    let outcome = desk.run(&PLAN);
    outcome.assert_refused(&["unknown field `xyzzy`", "`steps`"]);
    assert!(!outcome.stderr.contains("did you mean"), "{}", outcome.stderr);
}

#[test]
fn files_of_other_trainers_are_recognised() {
    let desk = Desk::new();
    for (name, text, told) in [
        (
            "musubi.toml",
            "[general]\nresolution = [960, 544]\n[[datasets]]\nvideo_directory = \"clips\"\n",
            "musubi-tuner",
        ),
        ("pipe.toml", "resolutions = [512]\n[[directory]]\npath = \"clips\"\n", "diffusion-pipe"),
        ("rows.csv", "video,prompt\na.gif,a cloud\n", "a dataset file"),
    ] {
        desk.write(name, text);
        desk.refuse(&["plan", name], &[told, &format!("import = \"{name}\"")]);
    }
    desk.write(
        "train.toml",
        "output_dir = 'out'\ndataset = 'd.toml'\nepochs = 1000\nmicro_batch_size_per_gpu = 1\n",
    );
    desk.refuse(&["plan", "train.toml"], &["training config of diffusion-pipe", "train.like"]);
    desk.write("job.yaml", "job: extension\nconfig:\n  name: x\n");
    desk.refuse(&["plan", "job.yaml"], &["TOML", "tandem new"]);
}

/// One path that TOML refuses, and one that it takes for something else.
#[test]
fn a_windows_path_in_double_quotes_is_told_how_to_write() {
    for path in ["D:\\users\\me\\clips", "D:\\train\\new"] {
        let desk = Desk::new();
        desk.change("folder = \"clips\"", &format!("folder = \"{path}\""));
        let slashes = path.replace('\\', "/");
        desk.refuse(&PLAN, &["single quotes", &format!("'{path}'"), &format!("\"{slashes}\"")]);
        desk.change(&format!("\"{path}\""), &format!("'{path}'"));
        desk.refuse(&PLAN, &["data.folder: there is no folder", path]);
    }
}

/// Only wrong paths are refused: comments, prompts and correct paths are not.
#[test]
fn only_broken_paths_are_refused() {
    let desk = Desk::new();
    desk.change("folder = \"clips\"", "folder = \"clips\" # was \"D:\\clips\"");
    desk.change(
        "[checkpoint]",
        "[sample]\nprompts = [\"a: b\\ta cloud\"]\nnegative = 'D:\\train'\n\n[checkpoint]",
    );
    desk.succeed(&PLAN);
}

/// Two clips in batches of one: two micro-batches an epoch.
#[test]
fn epochs_are_settled_into_steps() {
    let desk = Desk::new();
    desk.change("\nsteps = 2", "\nepochs = 7");
    let plan = desk.succeed(&PLAN).stdout;
    assert!(plan.contains("\nsteps = 14\n") && !plan.contains("epochs"), "{plan}");
    let plan = desk.succeed(&["plan", "recipe.toml", "--set", "train.accumulate=4"]).stdout;
    assert!(plan.contains("\nsteps = 4\n"), "{plan}");
    desk.change("epochs = 7", "epochs = 7\nsteps = 3");
    desk.refuse(&PLAN, &["train.steps or train.epochs", "not both"]);
    desk.change("epochs = 7\nsteps = 3", "epochs = 0");
    desk.refuse(&PLAN, &["train.epochs", "at least 1"]);
}

#[test]
fn settings_of_the_command_line_win_over_the_recipe() {
    let desk = Desk::new();
    let set = |settings: &[&str]| -> Vec<String> {
        let options = settings.iter().flat_map(|setting| ["--set".to_owned(), (*setting).to_owned()]);
        ["plan".to_owned(), "recipe.toml".to_owned()].into_iter().chain(options).collect()
    };
    let run = |settings: &[&str]| desk.run(&set(settings).iter().map(String::as_str).collect::<Vec<_>>());
    let plan =
        run(&["train.epochs=3", "adapter.rank = 3", "model.base=fp8", "train.timesteps.min=0.25"]).stdout;
    for told in ["\nsteps = 6\n", "\nrank = 3\n", "base = \"fp8\"", "\nmin = 0.25\n"] {
        assert!(plan.contains(told), "no {told} in {plan}");
    }
    run(&["train.step=3"]).assert_refused(&["--set train.step", "did you mean `steps`?"]);
    run(&["train.learning_rate=1"]).assert_refused(&["--set", "optimizer.lr"]);
    run(&["train.steps=many"]).assert_refused(&["--set train.steps", "many"]);
    run(&["steps=3"]).assert_refused(&["section.key=value"]);
    // A trainer's defaults give way to it, as they do to the recipe.
    let plan = run(&["train.like=musubi-tuner", "optimizer.lr=0.5"]).stdout;
    assert!(plan.contains("\nlr = 0.5\n") && plan.contains("alpha = 1.0"), "{plan}");
    let told = desk.succeed(&["train", "recipe.toml", "--set", "train.steps=1"]).stdout;
    assert!(told.contains("done: 1 steps"), "{told}");
}

#[test]
fn prompts_of_a_recipe_may_lie_in_a_file() {
    let desk = Desk::new();
    desk.write("prompts.txt", "# what to look at\na cloud --s 3\n\na hill --d 9\n");
    desk.change("[checkpoint]", "[sample]\nprompts = \"prompts.txt\"\n\n[checkpoint]");
    let plan = desk.succeed(&PLAN).stdout;
    for told in ["prompt = \"a cloud\"", "steps = 3", "prompt = \"a hill\"", "seed = 9"] {
        assert!(plan.contains(told), "no {told} in {plan}");
    }
    desk.change("\"prompts.txt\"", "\"none.txt\"");
    desk.refuse(&PLAN, &["sample.prompts", "none.txt"]);
    desk.write("none.txt", "# nothing yet\n");
    desk.refuse(&PLAN, &["sample.prompts", "holds no prompt"]);
}

/// What `new` writes is planned as it is, for a model on disk and clips that are smaller and shorter than usual.
#[test]
fn a_new_recipe_is_planned_as_it_was_written() {
    let desk = Desk::new();
    let told = desk.succeed(&["new", "--model", "model", "--data", "clips", "--output", "own.toml"]);
    assert!(told.stdout.contains("next: tandem plan own.toml") && told.stderr.is_empty(), "{}", told.stderr);
    let plan = desk.succeed(&["plan", "own.toml"]).stdout;
    assert!(plan.contains("sizes = [[16, 16]]") && plan.contains("frames = [5]"), "{plan}");
    assert!(plan.contains("prompt = \"a drifting cloud\""), "{plan}");
    desk.refuse(&["new", "--model", "model", "--output", "own.toml"], &["own.toml exists", "--force"]);

    // In another folder, where paths are taken from there.
    fs::create_dir(desk.path("recipes")).unwrap();
    desk.succeed(&["new", "--model", "model", "--data", "clips", "--output", "recipes/own.toml"]);
    desk.succeed(&["plan", "recipes/own.toml"]);

    // Before the model and the clips are here.
    let told = desk.succeed(&["new", "--model", "Wan-AI/Wan2.2-I2V-A14B", "--data", "later"]);
    assert!(told.stderr.contains("later"), "{}", told.stderr);
    let recipe = fs::read_to_string(desk.path("later.toml")).unwrap();
    assert!(recipe.contains("expert = \"both\"") && recipe.contains("--i first.png"), "{recipe}");
    desk.refuse(&["new", "--model", "someone/else", "--output", "x.toml"], &["someone/else", "tandem fetch"]);
}
