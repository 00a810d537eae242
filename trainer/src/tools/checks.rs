//! The page of what may be wrong with clips: each with some of its frames and what was found.

use base64::prelude::{BASE64_STANDARD, Engine};
use data::Checked;

use crate::error::Result;
use crate::report::html::{escaped, filled};

const TEMPLATE: &str = include_str!("checks.html");

/// The page of `checked`, those with findings first.
///
/// # Errors
/// Pictures that cannot be encoded.
pub fn page(name: &str, checked: &[Checked]) -> Result<String> {
    let (found, fine): (Vec<_>, Vec<_>) = checked.iter().partition(|clip| !clip.findings.is_empty());
    let mut clips = String::new();
    for clip in found.iter().chain(&fine) {
        clips.push_str(&in_html(clip)?);
    }
    let summary = format!("{} clips, {} of them with something to look at", checked.len(), found.len());
    let parts = [("name", escaped(name)), ("summary", summary), ("clips", clips)];
    Ok(filled(TEMPLATE, &parts))
}

fn in_html(clip: &Checked) -> Result<String> {
    let mut html = format!("<section><h2>{}</h2>\n<div class=\"row\">", escaped(&clip.id));
    for picture in &clip.shown {
        let png = BASE64_STANDARD.encode(picture.png()?);
        html.push_str(&format!("<img alt=\"\" src=\"data:image/png;base64,{png}\">"));
    }
    html.push_str("</div>\n");
    let findings = clip.findings.iter().map(|finding| format!("<li>{}</li>", escaped(&finding.to_string())));
    match clip.findings.is_empty() {
        true => html.push_str("<p class=\"quiet\">nothing was found</p>"),
        false => html.push_str(&format!("<ul>{}</ul>", findings.collect::<String>())),
    }
    html.push_str("</section>\n");
    Ok(html)
}
