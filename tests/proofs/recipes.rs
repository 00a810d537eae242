//! Recipes: each one that is shipped is read, and the page that documents the keys names all of them and no other.

use std::collections::BTreeMap;

use clap::{CommandFactory, Parser};
use kernels::device::Repeatability;
use models::published::Published;

use proofs::source::{File, files, root};
use serde_json::{Value, json};
use trainer::base::Trained;
use trainer::cli::Arguments;
use trainer::learning::ema::EmaConfig;
use trainer::machine::forecast::{Decoding, Engine, LossTask, Networks, StageMemory, Task, Way};
use trainer::machine::memory::{Card, Forecast, Machine, Room, Shapes, StageForecast, settle};
use trainer::machine::precision::{PrecisionRequest, Processor};
use trainer::recipe::{Recipe, WORDS, defaults};
use trainer::tools::bench::dit_preset;

fn shipped() -> Vec<File> {
    files(&[".toml"]).into_iter().filter(|file| file.path.starts_with("recipes/")).collect()
}

/// Every section of a recipe with all of its keys, those without a default as null, and a folder of clips.
fn sections() -> Value {
    let mut sections = defaults();
    sections["data"]["folder"] = json!(["clips"]);
    sections
}

/// The dotted keys below `value` with their defaults; an empty table is a key whose entries the user names.
fn keys_below(key: &str, value: &Value, keys: &mut BTreeMap<String, Value>) {
    match value.as_object().filter(|table| !table.is_empty()) {
        Some(table) => {
            for (name, value) in table {
                let below = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                keys_below(&below, value, keys);
            }
        }
        None => drop(keys.insert(key.to_owned(), value.clone())),
    }
}

/// (key, default) of the rows of the tables of `page` that begin with a key in backticks.
fn documented(page: &str) -> BTreeMap<String, String> {
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `")?.split(" | ");
        let key = cells.next()?.strip_suffix('`')?.to_owned();
        Some((key, cells.next()?.trim().to_owned()))
    };
    page.lines().filter_map(row).collect()
}

/// The TOML value that a cell is, in backticks or not; `None` for words.
fn literal(cell: &str) -> Option<toml::Value> {
    let bare = cell.strip_prefix('`').and_then(|rest| rest.strip_suffix('`')).unwrap_or(cell);
    toml::from_str::<toml::Table>(&format!("value = {bare}")).ok()?.remove("value")
}

/// Whoever picks an adapter file by eye has clips of each.
#[test]
fn clips_and_adapter_files_come_at_the_same_steps() {
    for file in shipped() {
        let recipe = Recipe::read(&root().join(&file.path)).unwrap();
        // Those whose clips need a picture of the user's make none as they are shipped.
        let every = if recipe.sample.prompts.is_empty() { None } else { Some(recipe.sample.every) };
        assert!(every.is_none_or(|every| every == recipe.checkpoint.every_steps), "{}", file.path);
    }
}

#[test]
fn every_shipped_recipe_is_read() {
    let recipes = shipped();
    assert!(!recipes.is_empty(), "no recipe is shipped");
    for file in recipes {
        Recipe::read(&root().join(&file.path)).unwrap_or_else(|error| panic!("{}: {error}", file.path));
    }
}

#[test]
fn the_page_of_keys_names_every_key_and_no_other() {
    let page = std::fs::read_to_string(root().join("recipes/README.md")).unwrap();
    let (mut keys, documented) = (BTreeMap::new(), documented(&page));
    keys_below("", &sections(), &mut keys);
    let missing: Vec<&String> = keys.keys().filter(|key| !documented.contains_key(*key)).collect();
    let unknown: Vec<&String> = documented.keys().filter(|key| !keys.contains_key(*key)).collect();
    assert!(missing.is_empty(), "keys that recipes/README.md does not document: {missing:#?}");
    assert!(unknown.is_empty(), "keys that recipes/README.md documents and no recipe has: {unknown:#?}");
}

/// A default that is written as a value is the default; words are for what depends on something else.
#[test]
fn the_page_of_keys_tells_the_defaults() {
    let page = std::fs::read_to_string(root().join("recipes/README.md")).unwrap();
    let (mut keys, documented) = (BTreeMap::new(), documented(&page));
    keys_below("", &sections(), &mut keys);
    let is_open = |default: &Value| default.is_null() || *default == json!([]) || *default == json!({});
    // The folder of the clips has no default, and the published negative prompt is too long for a table.
    let has_words = |key: &str| matches!(key, "data.folder" | "sample.negative");
    let mut compared = 0;
    for (key, cell) in documented.iter().filter(|(key, _)| !is_open(&keys[*key]) && !has_words(key)) {
        let default = &keys[key];
        let told =
            literal(cell).unwrap_or_else(|| panic!("{key}: the default is {default}, the page says {cell}"));
        let numbers = |value: Value| value.as_f64().map_or(value, |number| json!(number));
        let told = numbers(serde_json::to_value(told).unwrap());
        assert_eq!(told, numbers(default.clone()), "{key}");
        compared += 1;
    }
    assert!(compared > 30, "only {compared} defaults compared");
}

/// The sections above are those of a recipe: one that has each of them, with each of their keys that has a default, is
/// read, and one with a key more is refused by that key, with the nearest one that there is.
#[test]
fn a_recipe_with_every_key_is_read_and_one_with_another_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("all.toml");
    let mut sections = sections();
    for section in sections.as_object_mut().unwrap().values_mut() {
        section.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    }
    for (outer, inner) in [
        ("train", "timesteps"),
        ("train", "drop"),
        ("train", "loss"),
        ("train", "ema"),
        ("train", "prior"),
        ("optimizer", "rate"),
    ] {
        sections[outer][inner].as_object_mut().unwrap().retain(|_, value| !value.is_null());
    }
    let text = |value: &Value| toml::to_string(value).unwrap();
    std::fs::write(&path, text(&sections)).unwrap();
    Recipe::read(&path).unwrap();

    for (section, wrong, nearest) in
        [("train", "step", "steps"), ("optimizer", "learning_rate", "lr"), ("data", "frame", "frames")]
    {
        let mut changed = sections.clone();
        changed[section][wrong] = json!(1);
        std::fs::write(&path, text(&changed)).unwrap();
        let error = Recipe::read(&path).unwrap_err().to_string();
        assert!(error.contains(wrong) && error.contains(nearest), "{error}");
    }
}

/// Another trainer's setting name leads to an existing key, and is not itself a key of the same section.
#[test]
fn words_of_other_trainers_lead_to_keys_of_ours() {
    let mut keys = BTreeMap::new();
    keys_below("", &sections(), &mut keys);
    for (theirs, ours, _) in WORDS {
        assert!(keys.contains_key(ours), "{theirs}: there is no {ours}");
        let (section, _) = ours.rsplit_once('.').unwrap();
        assert!(!keys.contains_key(&format!("{section}.{theirs}")), "{theirs} is a key of ours");
    }
}

/// Every command has examples in its help, each of which is a command line that can be parsed; those that take a recipe say
/// where its keys are explained.
#[test]
fn examples_of_the_help_are_command_lines() {
    let commands = Arguments::command();
    for command in commands.get_subcommands() {
        let name = command.get_name();
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let examples: Vec<&str> =
            help.lines().filter_map(|line| line.trim().strip_prefix("tandem ")).collect();
        assert!(help.starts_with("Examples:") && !examples.is_empty(), "{name} has no examples");
        let takes_recipe = command.get_arguments().any(|argument| argument.get_id().as_str() == "recipe");
        assert!(!takes_recipe || help.contains("recipes/README.md"), "{name}");
        for example in examples {
            let line = example.split(['#', '>']).next().unwrap();
            // Arguments with spaces are in double quotes.
            let words = line.split('"').enumerate().flat_map(|(i, part)| match i % 2 {
                0 => part.split_whitespace().collect::<Vec<_>>(),
                _ => vec![part],
            });
            let words: Vec<&str> = std::iter::once("tandem").chain(words).collect();
            assert!(words.contains(&name), "{name}: {example}");
            match Arguments::try_parse_from(&words) {
                Ok(_) => {}
                // Models of the hub are looked for in the cache while arguments are parsed.
                Err(error) if error.to_string().contains("tandem fetch") => {}
                Err(error) => panic!("{example}: {error}"),
            }
        }
    }
}

/// What tensors get of a card that is sold with 24 GB: 24 GiB less what the driver takes.
const CARD: u64 = (24 << 30) - (600 << 20);
/// Half of a machine with 64 GiB: the default limit of pinned memory.
const HOST: u64 = 32 << 30;

/// The page is a guide: a forecast may change by this many GiB before the page has to be updated.
const NEAR: f64 = 1.0;

/// A machine with so many GPUs, all of 24 GB without a way to each other, and `host` bytes to pin; figures of an RTX 3090.
fn machine(cards: usize, host: u64) -> Machine {
    let engine = Engine::Cudnn(Repeatability::Fast);
    let card = |i| Card {
        name: format!("cuda:{i}"),
        engine,
        room: Room::AtMost(CARD),
        taken: 0,
        flops: 71e12,
        integer_ops: 284e12,
        link: 20e9,
    };
    Machine { ways: vec![Way::Host; cards - 1], stages: (0..cards).map(card).collect(), host }
}

/// The forecast of the largest clip that `recipe` could meet, for the published sizes of the model of that name.
fn forecast(name: &str, recipe: &Recipe, host: u64) -> Forecast {
    let dit = dit_preset(name).unwrap();
    let targets = recipe.adapter.select(&dit.adaptable_modules()).unwrap();
    let wishes = PrecisionRequest {
        base: recipe.model.base,
        stream: recipe.model.stream,
        ..PrecisionRequest::default()
    };
    let defaults = Published::named(name).unwrap().defaults();
    let frames = *recipe.data.frames.iter().max().unwrap();
    let shape = |&[width, height]: &[u32; 2]| {
        let fits = |side: u32| side.is_multiple_of(defaults.multiple());
        assert!(fits(width) && fits(height) && frames % 4 == 1, "{name}: {width}x{height}, {frames} frames");
        let (frames, height, width) = defaults.latents(frames, height, width);
        // Animate always has a reference picture.
        (frames.saturating_add_signed(dit.control.frames_beyond(0)), height, width)
    };
    let latents = recipe.data.sizes.iter().map(shape).max_by_key(|(t, h, w)| t * h * w).unwrap();
    let task = Task {
        dit: (&dit).into(),
        base: wishes.settle(Processor::Gpu).dit(),
        targets: &targets,
        kind: recipe.adapter.kind,
        factor: recipe.adapter.factor,
        rank: recipe.adapter.rank(),
        ranks: BTreeMap::new(),
        dropout: recipe.adapter.dropout > 0.0,
        batch: recipe.train.batch,
        accumulate: recipe.train.accumulate,
        small: None,
        replicas: 1,
        latents,
        continues: false,
        networks: match recipe.model.expert {
            Some(Trained::Both) => Networks::SideBySide,
            Some(_) => Networks::MakesRoom,
            None => Networks::One,
        },
        decoding: Decoding::Beside,
        rule: recipe.optimizer.rule(),
        ema: EmaConfig::default(),
        norm_limit: None,
        objective: LossTask::default(),
    };
    let settled =
        settle(&task, &machine(recipe.devices.stages.len(), host), &recipe.memory, None, &Shapes::default());
    settled.unwrap_or_else(|error| panic!("{name}: {error}")).forecast
}

/// The page has the memory of each recipe for 24 GB cards, and each fits.
#[test]
fn recipes_for_published_models_fit_the_cards_that_they_are_for() {
    let page = std::fs::read_to_string(root().join("recipes/README.md")).unwrap();
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    let (mut models, mut wrong) = (std::collections::BTreeSet::new(), Vec::new());
    for file in shipped().into_iter().filter(|file| file.path != "recipes/first-run.toml") {
        let stem = file.path.trim_start_matches("recipes/").trim_end_matches(".toml");
        let name = match stem {
            "comfyui-files" => "t2v-14b",
            stem => stem.trim_end_matches("-one-card"),
        };
        let recipe = Recipe::read(&root().join(&file.path)).unwrap();
        recipe.train.timesteps.check().unwrap();
        let forecast = forecast(name, &recipe, HOST);
        let stages = &forecast.stages;
        let host: u64 = stages.iter().map(|stage| stage.memory.host).sum();
        let mut counted = vec![stages.len() as f64];
        counted.extend(stages.iter().map(|stage| stage.memory.peak).chain([host]).map(gib));
        let row =
            page.lines().find_map(|line| line.strip_prefix(&format!("| [{stem}.toml]({stem}.toml) | ")));
        let cells = row.unwrap_or_else(|| panic!("{stem} is not on the page")).split(" | ").skip(1);
        let numbers = |cell: &str| -> Vec<f64> {
            cell.split(", ").map(|number| number.trim_end_matches(" |").parse().unwrap()).collect()
        };
        let told: Vec<f64> = cells.flat_map(numbers).collect();
        let is_near = told.iter().zip(&counted).all(|(told, counted)| (told - counted).abs() < NEAR);
        if told.len() != counted.len() || !is_near {
            wrong.push(format!("{stem}: {told:?} on the page, {counted:.1?} planned"));
        }
        models.insert(name.to_owned());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let published: Vec<&str> = Published::ALL.iter().map(|model| model.key).collect();
    assert!(published.iter().all(|name| models.contains(*name)), "a model without a recipe: {models:?}");
}

/// The README's table of forecasts: every row is what a plan finds, with 96 GiB to pin.
#[test]
fn the_readme_tells_what_plans_find() {
    let page = std::fs::read_to_string(root().join("README.md")).unwrap();
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    let rows = page.lines().filter(|line| line.starts_with("| T2V-") && line.matches('|').count() == 9);
    let rows: Vec<&str> = rows.collect();
    assert!(rows.len() > 3, "the table is gone");
    let mut wrong = Vec::new();
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [model, clip, base, cards, told @ ..] = &cells[..] else { panic!("{row}") };
        let (size, frames) = clip.trim_end_matches(" frames").split_once(", ").unwrap();
        let [width, height] = [0, 1].map(|i| size.split('x').nth(i).unwrap());
        let stages: Vec<String> = (0..cards.parse().unwrap()).map(|i| format!("\"cuda:{i}\"")).collect();
        let recipe = format!(
            "[model]\nfolder = \"x\"\nbase = \"{base}\"\n[data]\nfolder = \"x\"\nsizes = [[{width}, {height}]]\nframes = [{frames}]\n\
             [adapter]\nrank = 32\n[train]\nsteps = 1\naccumulate = 4\n[devices]\nstages = [{}]\n",
            stages.join(", ")
        );
        let recipe: Recipe = toml::from_str(&recipe).unwrap();
        let forecast = forecast(&model.to_lowercase(), &recipe, 96 << 30);
        let each = |of: &dyn Fn(&StageMemory) -> u64| {
            let of_stage = |stage: &StageForecast| format!("{:.1}", gib(of(&stage.memory)));
            forecast.stages.iter().map(of_stage).collect::<Vec<_>>().join(", ")
        };
        let host: u64 = forecast.stages.iter().map(|stage| stage.memory.host).sum();
        let most = forecast.stages[0].keep.iter().max_by_key(|run| run.count).unwrap();
        let found = [each(&|m| m.weights), each(&|m| m.peak), format!("{:.0}", gib(host)), most.to_string()];
        if told != found {
            wrong.push(format!("| {model} | {clip} | {base} | {cards} | {} |", found.join(" | ")));
        }
    }
    assert!(wrong.is_empty(), "plans find now:\n{}", wrong.join("\n"));
}

/// A recipe for two experts trains both on all noise levels, of which each gets its own, enough to learn from, and as many as
/// the recipe tells; and it fits with one expert alone and its clips, as it tells too.
#[test]
fn recipes_of_experts_stay_on_their_side() {
    /// The least share of the micro-batches that an expert is worth training for.
    const WORTH: f64 = 0.25;
    for name in ["t2v-a14b", "i2v-a14b", "fun-control-a14b", "fun-camera-a14b"] {
        let path = root().join(format!("recipes/{name}.toml"));
        let mut recipe = Recipe::read(&path).unwrap();
        let boundary = Published::named(name).unwrap().defaults().boundary;
        let timesteps = &recipe.train.timesteps;
        assert_eq!((recipe.model.expert, timesteps.min, timesteps.max), (Some(Trained::Both), 0.0, 1.0));
        let high = recipe.train.high_share.unwrap_or_else(|| timesteps.share_from(boundary));
        assert!(high > WORTH && high < 1.0 - WORTH, "{name}: {high} of the micro-batches for high noise");
        let told = format!(
            "{:.0} % of the clips to the expert for high noise, which begins at sigma {boundary}",
            100.0 * high
        );
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains(&told), "{name} does not tell: {told}");
        let places =
            [("both lie side by side", Networks::SideBySide), ("one waits in host memory", Networks::InTurn)];
        let told = places.into_iter().find(|(words, _)| text.contains(words));
        assert_eq!(
            told.map(|(_, networks)| networks),
            Some(forecast(name, &recipe, HOST).networks),
            "{name} tells where they lie"
        );
        recipe.model.expert = Some(Trained::High);
        forecast(name, &recipe, HOST);
    }
}
