//! The charts of a report, as SVG inside of the page, by `plotters`. Their colours are those of the page's theme.

use plotters::coord::Shift;
use plotters::prelude::*;

/// Size of a chart in pixels; the page scales it.
const SIZE: (u32, u32) = (540, 220);
/// Stands for the colour of text, which the page has for light and dark.
const INK: RGBColor = RGBColor(1, 1, 1);
/// Stands for the colour of grids.
const GRID: RGBColor = RGBColor(2, 2, 2);
/// Stand for the colours of lines.
const LINES: [RGBColor; 3] = [RGBColor(3, 3, 3), RGBColor(4, 4, 4), RGBColor(5, 5, 5)];
/// Each stand-in, and what the page calls its colour.
const NAMES: [(&str, &str); 5] = [
    ("#010101", "var(--quiet)"),
    ("#020202", "var(--line)"),
    ("#030303", "var(--accent)"),
    ("#040404", "var(--second)"),
    ("#050505", "var(--good)"),
];

/// How a row of points is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// A line.
    Line,
    /// Faint points.
    Points,
    /// A line with a point at each value.
    Dotted,
}

/// A row of points.
#[derive(Debug, Clone)]
pub struct Series {
    /// In the legend; none where it is empty.
    pub name: String,
    /// x and y.
    pub points: Vec<(f64, f64)>,
    /// Which of three colours.
    pub colour: usize,
    /// How it is drawn.
    pub mark: Mark,
    /// Half the height of a band around it at each point, or nothing.
    pub band: Vec<f64>,
}

/// Where the y axis begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Below the least value.
    Close,
    /// At 0.
    FromZero,
}

type Drawing<T> = std::result::Result<T, DrawingAreaErrorKind<std::io::Error>>;

/// The chart of `series` over the steps, with `label` on its y axis; empty where there is no point.
///
/// # Errors
/// What plotters cannot draw, in words.
pub fn lines(label: &str, series: &[Series], axis: Axis) -> std::result::Result<String, String> {
    let Some(range) = range(series, axis) else { return Ok(String::new()) };
    drawn(|area| draw_lines(area, (label, series), range))
}

/// The number of values in each of the equal parts of 0 to 1.
///
/// # Errors
/// As [`lines`].
pub fn histogram(label: &str, counts: &[u64]) -> std::result::Result<String, String> {
    if counts.iter().all(|count| *count == 0) {
        return Ok(String::new());
    }
    drawn(|area| draw_histogram(area, label, counts))
}

/// An SVG of what `draw` draws, in the colours of the page.
fn drawn(
    draw: impl FnOnce(&DrawingArea<SVGBackend, Shift>) -> Drawing<()>,
) -> std::result::Result<String, String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        draw(&area).and_then(|()| area.present()).map_err(|error| error.to_string())?;
    }
    Ok(NAMES.iter().fold(svg, |svg, (stand_in, name)| svg.replace(stand_in, name)))
}

/// Least and largest x and y, with room around; nothing without points.
fn range(series: &[Series], axis: Axis) -> Option<[f64; 4]> {
    let mut range = [f64::INFINITY, f64::NEG_INFINITY, f64::INFINITY, f64::NEG_INFINITY];
    for one in series {
        for (index, (x, y)) in
            one.points.iter().enumerate().filter(|(_, (x, y))| x.is_finite() && y.is_finite())
        {
            let band = one.band.get(index).copied().unwrap_or(0.0);
            range = [range[0].min(*x), range[1].max(*x), range[2].min(y - band), range[3].max(y + band)];
        }
    }
    if range[0] > range[1] {
        return None;
    }
    let room = match range[3] - range[2] {
        0.0 => range[3].abs().max(1e-9) * 0.1,
        height => height * 0.06,
    };
    let least = if axis == Axis::FromZero { 0.0 } else { range[2] - room };
    Some([range[0], range[1].max(range[0] + 1.0), least, range[3] + room])
}

fn draw_lines(
    area: &DrawingArea<SVGBackend, Shift>,
    (label, series): (&str, &[Series]),
    [left, right, bottom, top]: [f64; 4],
) -> Drawing<()> {
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(66)
        .build_cartesian_2d(left..right, bottom..top)?;
    let text = |size: u32| ("sans-serif", size).into_font().color(&INK);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(GRID)
        .label_style(text(13))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| number(*y))
        .x_desc("step")
        .y_desc(label)
        .draw()?;
    for one in series {
        let colour = LINES[one.colour % LINES.len()];
        let points = one.points.iter().copied();
        if !one.band.is_empty() {
            let edge =
                |sign: f64| one.points.iter().zip(&one.band).map(move |((x, y), band)| (*x, y + sign * band));
            let outline: Vec<(f64, f64)> =
                edge(1.0).chain(edge(-1.0).collect::<Vec<_>>().into_iter().rev()).collect();
            chart.draw_series(std::iter::once(Polygon::new(outline, colour.mix(0.15).filled())))?;
        }
        if one.mark != Mark::Line {
            let (size, style) = match one.mark {
                Mark::Points => (2, colour.mix(0.22).filled()),
                _ => (3, colour.filled()),
            };
            chart.draw_series(points.clone().map(|point| Circle::new(point, size, style)))?;
        }
        if one.mark != Mark::Points {
            let line = LineSeries::new(points, colour.stroke_width(2));
            let drawn = chart.draw_series(line)?;
            if !one.name.is_empty() {
                drawn.label(&one.name).legend(move |(x, y)| {
                    PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2))
                });
            }
        }
    }
    if series.iter().any(|one| !one.name.is_empty()) {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .label_font(text(13))
            .draw()?;
    }
    Ok(())
}

fn draw_histogram(area: &DrawingArea<SVGBackend, Shift>, label: &str, counts: &[u64]) -> Drawing<()> {
    let all: u64 = counts.iter().sum();
    let share = |count: u64| 100.0 * count as f64 / all as f64;
    let top = counts.iter().map(|count| share(*count)).fold(0.0, f64::max) * 1.08;
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(66)
        .build_cartesian_2d(0f64..1f64, 0f64..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(GRID)
        .label_style(("sans-serif", 13).into_font().color(&INK))
        .x_desc(label)
        .y_desc("% of the samples")
        .draw()?;
    let width = 1.0 / counts.len() as f64;
    chart.draw_series(counts.iter().enumerate().map(|(index, count)| {
        let left = index as f64 * width;
        Rectangle::new(
            [(left + width * 0.06, 0.0), (left + width * 0.94, share(*count))],
            LINES[0].mix(0.75).filled(),
        )
    }))?;
    Ok(())
}

/// A number on an axis: short, whatever its size.
fn number(value: f64) -> String {
    let size = value.abs();
    match size {
        0.0 => "0".to_owned(),
        size if !(1e-3..1e5).contains(&size) => format!("{value:.1e}"),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}
