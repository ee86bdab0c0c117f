//! The figures as plots (SVG): bars for each path, and the time of a transaction against the number of Services.

use std::path::{Path as FilePath, PathBuf};

use anyhow::anyhow;
use clap::ValueEnum as _;
use plotters::prelude::*;

use crate::latency::{self, Latency};
use crate::measure::Cell;
use crate::mode::Mode;
use crate::path::Path;
use crate::run::Test;

const SIZE: (u32, u32) = (960, 420);
const FONT: &str = "sans-serif";

fn colour(mode: Mode) -> RGBColor {
    match mode {
        Mode::Direct => RGBColor(140, 140, 140),
        Mode::Routed => RGBColor(200, 200, 200),
        Mode::Kubelane => RGBColor(31, 119, 180),
        Mode::Iptables => RGBColor(214, 39, 40),
        Mode::Nftables => RGBColor(255, 158, 74),
    }
}

/// Writes all plots that the figures allow into `directory`; their paths.
pub fn write(
    directory: &FilePath,
    cells: &[Cell],
    latencies: &[Latency],
    modes: &[Mode],
    machine: &str,
) -> anyhow::Result<Vec<PathBuf>> {
    let mut written = Vec::new();
    let mut counts: Vec<usize> = cells.iter().map(|cell| cell.others).collect();
    counts.dedup();
    for test in Test::ALL {
        for others in &counts {
            let group: Vec<&Cell> = cells.iter().filter(|c| c.test == test && c.others == *others).collect();
            if modes.contains(&Mode::Direct) && !group.is_empty() {
                let path = directory.join(format!("rates-{}-{others}.svg", test.name));
                let caption = format!("{} beside {others} other Services, as a share of the direct rate", test.name);
                bars(&path, &caption, machine, &group, modes).map_err(|error| anyhow!("{error}"))?;
                written.push(path);
            }
        }
        for way in Path::ALL {
            let line: Vec<&Cell> = cells.iter().filter(|c| c.test == test && c.path == way).collect();
            if line.len() > 1 && test.unit == "/s" {
                let path = directory.join(format!("growth-{}-{}.svg", test.name, file_name(way)));
                let caption = format!("{} on the path \"{way}\": time of a transaction", test.name);
                growth(&path, &caption, machine, &line, modes).map_err(|error| anyhow!("{error}"))?;
                written.push(path);
            }
        }
    }
    for way in latency::PATHS {
        let sides: Vec<&Latency> = latencies.iter().filter(|side| side.path == way).collect();
        for percent in [50.0, 99.0] {
            if !sides.is_empty() {
                let path = directory.join(format!("first-connection-p{percent}-{}.svg", file_name(way)));
                let caption = format!("First connection on the path \"{way}\": p{percent} of connect()");
                first_connections(&path, &caption, machine, &sides, percent).map_err(|error| anyhow!("{error}"))?;
                written.push(path);
            }
        }
    }
    Ok(written)
}

/// A path's name on the command line.
fn file_name(way: Path) -> String {
    way.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

/// For each path a bar for each mode: the median of the rounds' ratios to the direct rate, with the quartiles.
fn bars(path: &FilePath, caption: &str, machine: &str, cells: &[&Cell], modes: &[Mode]) -> Drawn {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let area = area.titled(machine, (FONT, 12))?;
    let most = cells.iter().flat_map(|cell| modes.iter().map(|mode| cell.ratio(*mode, Mode::Direct).percentile(75.0)));
    let most = most.filter(|ratio| ratio.is_finite()).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(&area)
        .caption(caption, (FONT, 16))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(45)
        .build_cartesian_2d(0.0..cells.len() as f64, 0.0..most * 1.05)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(2 * cells.len() + 1)
        .x_label_formatter(&|x| {
            let is_middle = (x.fract() - 0.5).abs() < 0.01;
            cells.get(*x as usize).filter(|_| is_middle).map(|cell| cell.path.to_string()).unwrap_or_default()
        })
        .draw()?;
    let width = 0.84 / modes.len() as f64;
    for (place, mode) in modes.iter().enumerate() {
        let colour = colour(*mode);
        let shown: Vec<(f64, f64, f64, f64)> = cells
            .iter()
            .enumerate()
            .map(|(at, cell)| (at, cell.ratio(*mode, Mode::Direct)))
            .filter(|(_, ratio)| ratio.len() > 0)
            .map(|(at, ratio)| {
                let left = at as f64 + 0.08 + place as f64 * width;
                (left, ratio.median(), ratio.percentile(25.0), ratio.percentile(75.0))
            })
            .collect();
        let bars = shown
            .iter()
            .map(|(left, median, ..)| Rectangle::new([(*left, 0.0), (left + width * 0.92, *median)], colour.filled()));
        chart
            .draw_series(bars)?
            .label(mode.to_string())
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 10, y + 5)], colour.filled()));
        let middle = |left: f64| left + width * 0.46;
        let spread = shown.iter().map(|(left, _, low, high)| (middle(*left), *low, *high));
        chart.draw_series(spread.map(|(x, low, high)| PathElement::new([(x, low), (x, high)], BLACK)))?;
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
    area.present()?;
    Ok(())
}

/// The time of a transaction in each mode.
fn growth(path: &FilePath, caption: &str, machine: &str, cells: &[&Cell], modes: &[Mode]) -> Drawn {
    let counts: Vec<usize> = cells.iter().map(|cell| cell.others).collect();
    let line = |mode: &Mode| (*mode, cells.iter().map(|cell| 1e6 / cell.rates(*mode).median()).collect());
    lines(path, caption, machine, &counts, &modes.iter().map(line).collect::<Vec<_>>())
}

/// A percentile of first connections in each mode. One that knows no Services has the same at any number of them.
fn first_connections(path: &FilePath, caption: &str, machine: &str, sides: &[&Latency], percent: f64) -> Drawn {
    let mut counts: Vec<usize> = sides.iter().map(|side| side.others).collect();
    counts.sort_unstable();
    counts.dedup();
    let modes = Mode::ALL.into_iter().filter(|mode| sides.iter().any(|side| side.mode == *mode));
    let line = |mode: Mode| {
        let at = |count: &usize| {
            let side = sides.iter().find(|side| side.mode == mode && (side.others == *count || mode.is_plain()));
            side.map_or(f64::NAN, |side| side.all().percentile(percent))
        };
        (mode, counts.iter().map(at).collect())
    };
    lines(path, caption, machine, &counts, &modes.map(line).collect::<Vec<_>>())
}

/// A line for each mode: microseconds at each of `counts`, NaN for none. Numbers of Services are set out evenly. Times
/// are set out by their logarithm: one mode may take thirty times as long as the others.
fn lines(path: &FilePath, caption: &str, machine: &str, counts: &[usize], modes: &[(Mode, Vec<f64>)]) -> Drawn {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let area = area.titled(machine, (FONT, 12))?;
    let all = modes.iter().flat_map(|(_, times)| times.iter().copied()).filter(|time| time.is_finite());
    let (least, most) = all.fold((1e6, 1.0), |(least, most), time| (f64::min(least, time), f64::max(most, time)));
    // Whole decades: a part of one would have no number beside it.
    let (low, high) = ((least.min(most) * 0.9).log10().floor(), (most * 1.1).log10().ceil());
    let last = (counts.len() - 1) as f64;
    let mut chart = ChartBuilder::on(&area)
        .caption(caption, (FONT, 16))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(-0.2..last + 0.2, (10f64.powf(low)..10f64.powf(high)).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(5 * counts.len())
        .x_label_formatter(&|x| {
            let is_whole = (x - x.round()).abs() < 0.01 && *x > -0.01;
            counts.get(x.round() as usize).filter(|_| is_whole).map(ToString::to_string).unwrap_or_default()
        })
        .x_desc("other Services")
        .y_desc("microseconds, logarithmic")
        .y_label_formatter(&|time| format!("{time:.0}"))
        .draw()?;
    for (mode, times) in modes {
        let colour = colour(*mode);
        let points = times.iter().enumerate().map(|(at, time)| (at as f64, *time));
        let line: Vec<(f64, f64)> = points.filter(|(_, time)| time.is_finite()).collect();
        chart
            .draw_series(LineSeries::new(line.clone(), colour.stroke_width(2)))?
            .label(mode.to_string())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 15, y)], colour.stroke_width(2)));
        chart.draw_series(line.into_iter().map(|at| Circle::new(at, 3, colour.filled())))?;
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
    area.present()?;
    Ok(())
}
