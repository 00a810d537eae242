//! `tandem plan`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use data::Footage;
use models::expert::Expert;
use models::published::Published;

use super::devices::RecipeDevices;
use super::fetch::{Missing, resolved};
use super::noise_levels;
use super::replica::BYTES_OF_GIGABIT;
use crate::bytes::Bytes;
use crate::machine::memory::Cards;
use crate::plan::{self, Overrides, Planned, TextsToEncode};
use crate::watch::ui::Ui;

/// Resolve a recipe and print every setting, the memory that it needs and the buckets of the clips. Nothing is written,
/// except into the cache: unpacked tar files, and the bars and scenes of clips where the recipe asks for them.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Plan {
    /// The recipe.
    recipe: PathBuf,
    /// Plan for cards that this machine does not have: an amount of memory, such as 24GiB or 2x24GiB, or cards by name, such as
    /// 2x4090 or 3090,4090.
    #[arg(long, value_name = "CARDS")]
    on: Option<Cards>,
    /// Plan for a published model without its files. Models of the hub in a recipe are assumed without this option.
    #[arg(long, value_parser = published(), value_name = "MODEL")]
    assume: Option<&'static Published>,
    /// What a link between replicas moves each way, in Gb/s, for the estimate of devices.replicas: 10 Gb/s Ethernet unless given.
    #[arg(long, value_name = "GB_S", value_parser = link)]
    link: Option<f64>,
    #[command(flatten)]
    devices: RecipeDevices,
}

const EXAMPLES: &str = "\
Examples:
  tandem plan my.toml
  tandem plan my.toml --memory-limit 22GiB   # what a smaller card would do
  tandem plan my.toml --on 2x4090            # on cards that are not here
  tandem plan my.toml --on 2x4090 --set devices.replicas=8 --link 25   # eight replicas over 25 Gb/s
  tandem plan my.toml --on 24GiB --assume t2v-14b --set train.accumulate=2

Every key of a recipe is explained in recipes/README.md.";

impl Plan {
    /// Prints the plan.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let (cards, assume) = (self.on.clone(), self.assume);
        let link = self.link.map(|gigabits| gigabits * BYTES_OF_GIGABIT);
        let overrides = Overrides { cards, assume, link, ..self.devices.overrides() };
        let overrides = resolved(&self.recipe, overrides, Missing::Tell, ui)?;
        let planned = make(&self.recipe, &overrides, ui)?;
        let forecast = &planned.forecast;
        let footage = planned.dataset.footage();
        let levels = plan::noise_levels(&planned)?;
        let object = serde_json::json!({
            "plan": planned.plan,
            "memory": forecast,
            "notes": planned.notes,
            "texts": texts(&planned),
            "noise_levels": levels,
            "footage": { "seconds_found": footage.found, "seconds_trained": footage.trained },
        });
        let text = format!(
            "{}\n{}\n{}{}{}{}{forecast}",
            planned.plan.to_toml()?,
            buckets(&planned),
            in_words(&footage),
            captions(&planned),
            experts(&planned.plan)?,
            noise_levels::in_bars(&levels)
        );
        ui.tell(&text, &object);
        Ok(0)
    }
}

/// Parses the key of a published model.
pub fn published() -> impl TypedValueParser<Value = &'static Published> {
    let values = Published::ALL.iter().map(|model| PossibleValue::new(model.key).help(model.title));
    PossibleValuesParser::new(values)
        .try_map(|key| Published::named(&key).ok_or_else(|| format!("no published model is called {key}")))
}

/// Reads a positive number of Gb/s.
fn link(text: &str) -> std::result::Result<f64, String> {
    let link: Option<f64> = text.parse().ok().filter(|link: &f64| (1e-3..=1e6).contains(link));
    link.ok_or_else(|| format!("\"{text}\" is no link; write its rate in Gb/s, such as 25"))
}

/// Captions that a plan shows.
const CAPTIONS: usize = 3;

/// Resolves a recipe with a progress bar for reading the clips.
pub fn make(recipe: &std::path::Path, overrides: &Overrides, ui: &Ui) -> crate::Result<Planned> {
    let mut bar = None;
    let planned = plan::Plan::make_with(recipe, overrides, &mut |done, total| {
        let bar = bar.get_or_insert_with(|| ui.bar("reading clips", total));
        if done > 0 {
            bar.inc(1);
        }
        if done == total {
            bar.finish();
        }
    })?;
    planned.notes.iter().chain(&planned.dataset.notes).for_each(|note| ui.note(note));
    let skipped = &planned.dataset.skipped;
    if !skipped.is_empty() {
        let lines: String = skipped.iter().map(|clip| format!("\n  {clip}")).collect();
        ui.note(&format!("left out, because they cannot be used ({}):{lines}", skipped.len()));
    }
    if let Some(like) = planned.plan.train.like {
        let taken = planned.taken.iter().map(|taken| format!("\n  {taken}")).collect::<String>();
        ui.note(&format!("as in {}, where the recipe says nothing:{taken}", like.name()));
    }
    Ok(planned)
}

/// The experts that are trained, one per line, with their noise levels and their fraction of the micro-batches; empty for a
/// model of one network.
pub fn experts(plan: &plan::Plan) -> crate::Result<String> {
    let mut text = String::new();
    for range in plan.trained_ranges() {
        let Some(expert) = range.expert() else { continue };
        let seen = plan.train.timesteps.within(range)?;
        let part = match (expert, plan.train.high_share) {
            (_, None) => 1.0,
            (Expert::High, Some(high)) => high,
            (Expert::Low, Some(high)) => 1.0 - high,
        };
        text.push_str(&format!(
            "expert for {expert} noise: sigma {:.3} .. {:.3}, {:.1} % of the micro-batches\n",
            seen.min,
            seen.max,
            100.0 * part
        ));
    }
    Ok(text)
}

/// Most clips that are listed because less than half of them is trained.
const LISTED: usize = 5;

/// How much of the clips' time is trained, and of which clips least; `None` for stills only.
fn in_words(footage: &Footage) -> String {
    if footage.found == 0.0 {
        return String::new();
    }
    let mut text = format!("footage: {:.1} s of {:.1} s are trained", footage.trained, footage.found);
    if !footage.cut.is_empty() {
        text.push_str("; data.extract, data.windows and data.frames say which part");
    }
    for (id, trained, found) in footage.cut.iter().take(LISTED) {
        text.push_str(&format!("\n  {id}: {trained:.1} s of {found:.1} s"));
    }
    if footage.cut.len() > LISTED {
        text.push_str(&format!(
            "\n  and {} more of which less than half is trained",
            footage.cut.len() - LISTED
        ));
    }
    text.push('\n');
    text
}

/// The first captions as they are trained, with prefix and trigger.
fn captions(planned: &Planned) -> String {
    let sources = &planned.dataset.sources;
    let line = |source: &data::Source| format!("  {}: {}\n", source.item.id, source.item.caption);
    let lines: String = sources.iter().take(CAPTIONS).map(line).collect();
    let of = match sources.len() {
        0..=CAPTIONS => String::new(),
        more => format!(", {CAPTIONS} of {more}"),
    };
    let texts = texts(planned);
    let most = sources.iter().map(|source| source.item.variants.len()).max().unwrap_or(0);
    let several = match most {
        0 => String::new(),
        most => format!(
            "  one of up to {most} texts of a clip is drawn for each sample: {} texts are encoded, at most {}\n",
            texts.count,
            Bytes(texts.bytes)
        ),
    };
    if sources.is_empty() {
        String::new()
    } else {
        format!("captions as they are trained{of}:\n{lines}{several}")
    }
}

/// The texts that are encoded for the clips.
pub fn texts(planned: &Planned) -> TextsToEncode {
    let size = planned.plan.model.precision.text().compute.size_in_bytes();
    plan::texts_to_encode((&planned.dataset, &planned.plan.train), (planned.dit.text_dim, size))
}

/// The buckets as a table.
pub fn buckets(planned: &Planned) -> String {
    let mut lines =
        vec![format!("{:>6} {:>6} {:>7} {:>7} {:>8}", "width", "height", "frames", "clips", "windows")];
    for row in planned.dataset.table().rows {
        let bucket = row.bucket;
        let mut line = format!(
            "{:>6} {:>6} {:>7} {:>7} {:>8}",
            bucket.width, bucket.height, bucket.frames, row.clips, row.windows
        );
        if row.enlarged > 0 {
            line.push_str(&format!("   {} of them smaller than this and enlarged", row.enlarged));
        }
        lines.push(line);
    }
    lines.join("\n")
}
