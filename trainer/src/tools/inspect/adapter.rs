//! Adapter files.

use std::collections::BTreeSet;
use std::path::Path;

use models::adapter::AdapterKind;
use models::adapter::files::{self, ModuleSummary};
use models::dit::LayerId;
use models::names::split_layer;
use models::weights::Checkpoint;
use serde_json::json;

use super::{Report, dit};
use crate::error::Result;

/// Style, modules, ranks and the model that an adapter fits.
pub(super) fn report(path: &Path, file: &Checkpoint) -> Result<Report> {
    let summary = files::summary(path, file)?;
    let modules = || summary.modules.values();
    let ranks: BTreeSet<usize> = modules().map(|module| module.rank).collect();
    let scales: BTreeSet<String> = modules().map(scale).collect();
    let local = |name: &str| split_layer(name).map_or(name.to_owned(), |(_, local)| local.to_owned());
    let targets: BTreeSet<String> = summary.modules.keys().map(|name| local(name)).collect();
    let kinds: BTreeSet<&str> =
        modules().map(|module| module.kind.map_or("difference", AdapterKind::name)).collect();
    let kind = kinds.into_iter().collect::<Vec<_>>().join(", ");
    Ok(Report::new(format!("{kind} adapter"))
        .with("style", summary.style.to_string())
        .with("modules", summary.modules.len())
        .with("targets", json!(targets))
        .with("rank", json!(ranks))
        .with("alpha / rank", json!(scales))
        .with("fits", fits(&summary.modules))
        .with_metadata(file))
}

fn scale(module: &ModuleSummary) -> String {
    match module.alpha {
        _ if module.rank == 0 => "1 (no factors)".to_owned(),
        Some(alpha) => format!("{}", f64::from(alpha) / module.rank as f64),
        None => "1 (no alpha stored)".to_owned(),
    }
}

/// The model whose width and blocks these are.
fn fits(modules: &std::collections::BTreeMap<String, ModuleSummary>) -> String {
    let width = modules.iter().find(|(name, _)| name.ends_with("_attn.q")).map(|(_, q)| q.input);
    let width = width.or(modules.iter().find(|(name, _)| name.ends_with("ffn.0")).map(|(_, ffn)| ffn.input));
    let blocks =
        modules.keys().filter_map(|name| split_layer(name)).map(|(id, _)| id.index() + 1).max().unwrap_or(0);
    let has_image_branch = modules.keys().any(|name| name.ends_with("_img"));
    let has_side_chain = modules.keys().any(|name| name.starts_with(LayerId::SIDE_BLOCKS));
    let Some(width) = width.or(modules.values().next().map(|module| module.input)) else {
        return "nothing: it has no modules".into();
    };
    let model =
        dit::model_of_width(width, has_image_branch, has_side_chain).unwrap_or("no published Wan model");
    format!("{model} (width {width}, blocks 0..{blocks})")
}
