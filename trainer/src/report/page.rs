//! The page: its template filled with what a run has come to.

use std::path::Path;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::charts::{Axis, Mark, Series, histogram, lines};
use super::history::{HeldOutRow, History, StepRow, smoothed, thinned};
use super::html::{escaped, filled};
use super::scores::Scored;
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::sample::{ClipFormat, clip_name};

const TEMPLATE: &str = include_str!("page.html");
/// What is written as %XX in a link.
const NO_LETTER_OF_A_PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'/');
/// Points of a line at most: a browser draws more of them no finer.
const POINTS: usize = 400;
/// Steps whose mean is drawn.
const SMOOTHED_OVER: usize = 50;
/// Parts of the noise levels in the histogram.
const PARTS: usize = 25;

/// What a report shows besides the log.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The forecast of memory and time, as `tandem plan` prints it; nothing where it is not known.
    pub forecast: String,
    /// Notes of the plan.
    pub notes: Vec<String>,
    /// How the run stands: it trains, it is stopped, it has ended.
    pub state: String,
}

/// The page of the run in the folder `root`.
///
/// # Errors
/// Charts that cannot be drawn.
pub fn page(
    root: &Path,
    plan: &Plan,
    (history, scored): (&History, &[Scored]),
    facts: &Facts,
) -> Result<String> {
    let warnings: String =
        facts.notes.iter().map(|note| format!("<p class=\"warn\">{}</p>\n", escaped(note))).collect();
    let memory = match facts.forecast.is_empty() {
        true => String::new(),
        false => format!("<div class=\"card\"><pre>{}</pre></div>", escaped(&facts.forecast)),
    };
    let parts = [
        ("name", escaped(&plan.run.name)),
        ("state", escaped(&facts.state)),
        ("warnings", warnings),
        ("charts", charts(history).map_err(|why| Error::Report { why })?),
        ("clips", clips(root, plan)),
        ("checkpoints", checkpoints(root, scored)),
        ("told", told(history)),
        ("memory", memory),
        ("plan", escaped(&plan.to_toml()?)),
    ];
    Ok(filled(TEMPLATE, &parts))
}

/// `path` below `root` as a link.
fn link(root: &Path, path: &Path) -> String {
    let below = path.strip_prefix(root).unwrap_or(path).to_string_lossy().replace('\\', "/");
    utf8_percent_encode(&below, NO_LETTER_OF_A_PATH).to_string()
}

/// A number of each step that has it, over the steps.
fn column(history: &History, value: impl Fn(&StepRow) -> Option<f64>) -> Vec<(f64, f64)> {
    history.steps.iter().filter_map(|row| Some((row.step as f64, value(row)?))).collect()
}

fn charts(history: &History) -> std::result::Result<String, String> {
    let of = |value: fn(&StepRow) -> f64| column(history, |row| Some(value(row)));
    let one = |points: Vec<(f64, f64)>| Series {
        name: String::new(),
        points: thinned(&points, POINTS),
        colour: 0,
        mark: Mark::Line,
        band: Vec::new(),
    };
    let mut drawn = vec![lines("loss", &losses(history), Axis::Close)?];
    drawn.push(lines("held-out loss", &held_out(history), Axis::Close)?);
    drawn.push(lines("learning rate", &[one(of(|row| row.lr))], Axis::FromZero)?);
    drawn.push(lines("gradient norm", &[one(of(|row| row.grad_norm))], Axis::FromZero)?);
    drawn.push(lines("seconds a step", &[one(of(|row| row.seconds))], Axis::FromZero)?);
    let mut counts = [0u64; PARTS];
    for sigma in history.steps.iter().flat_map(|row| &row.sigma) {
        counts[((sigma * PARTS as f64) as usize).min(PARTS - 1)] += 1;
    }
    drawn.push(histogram("noise levels that were drawn (sigma)", &counts)?);
    let charts = drawn.into_iter().filter(|chart| !chart.is_empty());
    Ok(charts.map(|chart| format!("<div class=\"chart\">{chart}</div>\n")).collect())
}

/// The training loss: each step, and its mean over the newest; of two experts that of each.
fn losses(history: &History) -> Vec<Series> {
    let all = column(history, |row| Some(row.loss));
    let points = Series {
        name: String::new(),
        points: thinned(&all, 2 * POINTS),
        colour: 0,
        mark: Mark::Points,
        band: Vec::new(),
    };
    let line = |name: &str, rows: &[(f64, f64)], colour: usize| Series {
        name: name.to_owned(),
        points: thinned(&smoothed(rows, SMOOTHED_OVER), POINTS),
        colour,
        mark: Mark::Line,
        band: Vec::new(),
    };
    let expert = |name: &str| column(history, |row| row.experts.get(name).map(|own| own.loss));
    let (high, low) = (expert("high"), expert("low"));
    let mean = format!("mean of {SMOOTHED_OVER} steps");
    match high.is_empty() && low.is_empty() {
        true => vec![points, line(&mean, &all, 0)],
        false => vec![
            points,
            line(&format!("high noise, {mean}"), &high, 1),
            line(&format!("low noise, {mean}"), &low, 2),
        ],
    }
    .into_iter()
    .filter(|series| !series.points.is_empty())
    .collect()
}

/// The held-out loss of each network with its band.
fn held_out(history: &History) -> Vec<Series> {
    let series = |(index, (expert, rows)): (usize, (&String, &Vec<HeldOutRow>))| Series {
        name: match expert.as_str() {
            "" => "held out, with two standard errors of its change".to_owned(),
            expert => format!("{expert} noise"),
        },
        points: rows.iter().map(|row| (row.step as f64, row.loss)).collect(),
        colour: index + usize::from(history.held_out.len() > 1),
        mark: Mark::Dotted,
        band: rows.iter().map(|row| row.band).collect(),
    };
    history.held_out.iter().enumerate().map(series).collect()
}

/// The clips of every set, a row for each prompt, the newest first.
fn clips(root: &Path, plan: &Plan) -> String {
    let mut sets: Vec<(u64, std::path::PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(root.join("samples")).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let step = name.strip_prefix("step-").and_then(|step| step.parse().ok());
        sets.extend(step.map(|step| (step, entry.path())));
    }
    sets.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    let mut rows = String::new();
    for (index, clip) in plan.sample.clips.iter().enumerate() {
        let mut figures = String::new();
        for (step, folder) in &sets {
            let stem = clip_name(index, &clip.prompt);
            let file = |format: &ClipFormat| folder.join(format!("{stem}.{}", format.extension()));
            let Some(path) = plan.sample.formats.iter().map(file).find(|path| path.is_file()) else {
                continue;
            };
            let url = link(root, &path);
            let shown = match path.extension().is_some_and(|end| end == "mp4") {
                true => format!("<video src=\"{url}\" muted loop playsinline preload=\"auto\"></video>"),
                false => format!("<img src=\"{url}\" alt=\"clip of step {step}\">"),
            };
            figures.push_str(&format!("<figure>{shown}<figcaption>step {step}</figcaption></figure>\n"));
        }
        if !figures.is_empty() {
            let prompt = escaped(&clip.prompt);
            rows.push_str(&format!(
                "<h3>{prompt}</h3>\n<div class=\"row\" tabindex=\"0\">\n{figures}</div>\n"
            ));
        }
    }
    match rows.is_empty() {
        true => String::new(),
        false => {
            format!("<h2>Clips</h2>\n<button id=\"together\">Play all from the beginning</button>\n{rows}")
        }
    }
}

fn checkpoints(root: &Path, scored: &[Scored]) -> String {
    if scored.is_empty() {
        return "<p class=\"quiet\">none yet</p>".to_owned();
    }
    let mut rows = String::new();
    for (index, one) in scored.iter().enumerate() {
        let loss =
            one.held_out.map_or_else(|| "-".to_owned(), |(loss, band)| format!("{loss:.5} ± {band:.5}"));
        let verdict = match (one.held_out, index, one.is_near_best) {
            (None, ..) => "",
            (Some(_), 0, _) => "least",
            (_, _, true) => "as good as the least, within its band",
            (_, _, false) => "",
        };
        let files = one.adapters.iter().chain(&one.contact_sheet).chain(&one.checkpoint);
        let links: Vec<String> = files
            .map(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                format!("<a href=\"{}\">{}</a>", link(root, path), escaped(&name))
            })
            .collect();
        rows.push_str(&format!(
            "<tr><td>{}</td><td>{loss}</td><td>{verdict}</td><td>{}</td></tr>\n",
            one.step,
            links.join("<br>")
        ));
    }
    format!(
        "<div class=\"table\"><table><thead><tr><th>step</th><th>held-out loss</th><th></th><th>files</th></tr></thead>\n\
         <tbody>{rows}</tbody></table></div>"
    )
}

fn told(history: &History) -> String {
    if history.told.is_empty() {
        return String::new();
    }
    let rows: String = history
        .told
        .iter()
        .map(|(step, told)| format!("<li>after step {step}: {}</li>", escaped(told)))
        .collect();
    format!("<h2>What it was told</h2>\n<ul>{rows}</ul>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_filled_in_is_no_template_and_no_html() {
        let parts = [("a", escaped("<b>{{b}}\"")), ("b", "no".to_owned())];
        assert_eq!(filled("x{{a}}y{{b}}z{{c}}", &parts), "x&lt;b&gt;{{b}}&quot;ynoz");
        assert_eq!(link(Path::new("/r"), Path::new("/r/samples/a b%é.mp4")), "samples/a%20b%25%C3%A9.mp4");
    }
}
