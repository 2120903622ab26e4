//! What is shown of a run, as words and as a table of plain text.

use super::View;
use crate::job::table::{NodeRow, RankRow, Restart};

/// Heads of the columns of ranks.
pub const RANK_HEADS: [&str; 8] =
    ["rank", "host", "process", "doing", "step", "loss", "waiting", "quiet"];
/// Which of them are numbers, set to the right.
pub const RANK_NUMBERS: [bool; 8] = [true, false, true, false, true, true, true, true];
/// Restarts that are shown.
pub const SHOWN_RESTARTS: usize = 5;

/// The cells of a rank.
pub fn rank_cells(rank: &RankRow) -> [String; 8] {
    let doing = match rank.is_waiting {
        true => format!("{}, waits", rank.phase.name()),
        false => rank.phase.name().to_owned(),
    };
    let step = match rank.steps {
        0 => "-".to_owned(),
        steps => format!("{}/{steps}", rank.step),
    };
    [
        rank.rank.to_string(),
        rank.host.clone(),
        rank.pid.to_string(),
        doing,
        step,
        rank.loss.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.4}")),
        rank.wait_share.map_or_else(|| "-".to_owned(), |share| format!("{:.0} %", share * 100.0)),
        format!("{:.1} s", rank.quiet_s),
    ]
}

/// The run in one line: its name, what it is at, for how long.
pub fn title(view: &View) -> String {
    let table = &view.table;
    let (least, most) = table.nodes_wanted;
    let mut parts = vec![view.name(), table.state.name().to_owned()];
    if most > 1 {
        let wanted = if least == most { most.to_string() } else { format!("{least} to {most}") };
        parts.push(format!("nodes: {} of {wanted}", table.nodes.len()));
    }
    parts.push(format!("ranks: {}", table.ranks.len()));
    parts.push(format!("for {}", duration(table.elapsed_s)));
    parts.join("   ")
}

/// How the training goes, in one line; `None` before it has begun.
pub fn progress(view: &View) -> Option<String> {
    let (step, steps) = steps_of(view)?;
    let mut parts = vec![format!("step {step} of {steps}")];
    if let Some(rate) = view.steps_per_second {
        parts.push(match rate {
            slow if slow < 0.1 => format!("{:.1} s/it", 1.0 / slow),
            rate => format!("{rate:.2} it/s"),
        });
    }
    let first = view.table.ranks.first();
    if let Some(speed) = first.and_then(|rank| rank.images_per_second) {
        parts.push(format!("{speed:.2} images/s"));
    }
    if let Some(loss) = first.and_then(|rank| rank.loss) {
        parts.push(format!("loss {loss:.4}"));
    }
    if let Some(rate) = view.steps_per_second.filter(|rate| *rate > 0.0) {
        parts.push(format!("{} left", duration(steps.saturating_sub(step) as f64 / rate)));
    }
    if let Some(kept) = view.table.kept_step {
        parts.push(format!("kept in memory: step {kept}"));
    }
    Some(parts.join("   "))
}

/// Steps done and to do.
pub fn steps_of(view: &View) -> Option<(u64, u64)> {
    let of_rank = |rank: &RankRow| (rank.step, rank.steps);
    view.table.ranks.iter().map(of_rank).max().filter(|(_, steps)| *steps > 0)
}

/// A line for each node that says more than its ranks do: it is quiet, or runs none.
pub fn node_lines(view: &View) -> Vec<String> {
    let is_odd = |node: &&NodeRow| !node.is_running || node.quiet_s > 2.0;
    let line = |node: &NodeRow| {
        let state = if node.is_running { "runs" } else { "waits, runs nothing" };
        let quiet = if node.quiet_s > 2.0 {
            format!(", not heard from for {:.1} s", node.quiet_s)
        } else {
            String::new()
        };
        format!("node {} ({}) {state}{quiet}", node.node, node.host)
    };
    view.table.nodes.iter().filter(is_odd).map(line).collect()
}

/// A line for each of the last starts after the first, the newest first.
pub fn restart_lines(view: &View) -> Vec<String> {
    let line = |restart: &Restart| {
        let from = match restart.from_step {
            Some(step) => format!("from step {step}"),
            None => "from the beginning of the run".to_owned(),
        };
        format!(
            "{} after start {}, {from}: {}",
            duration(restart.at_s),
            restart.generation,
            restart.reason
        )
    };
    view.table.restarts.iter().rev().take(SHOWN_RESTARTS).map(line).collect()
}

/// All of it, as plain text.
pub fn table(view: &View) -> String {
    let mut lines = vec![title(view), view.command.clone()];
    lines.extend(progress(view));
    if !view.table.ranks.is_empty() {
        lines.push(String::new());
        let rows: Vec<[String; 8]> = view.table.ranks.iter().map(rank_cells).collect();
        lines.extend(aligned(&rows));
    }
    lines.extend(node_lines(view));
    let restarts = restart_lines(view);
    if !restarts.is_empty() {
        lines.push(String::new());
        lines.push(format!("started again: {}", view.table.restarts.len()));
        lines.extend(restarts.into_iter().map(|line| format!("  {line}")));
    }
    lines.join("\n") + "\n"
}

/// Width of each column.
pub fn widths(rows: &[[String; 8]]) -> [usize; 8] {
    std::array::from_fn(|column| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([RANK_HEADS[column].len()]).max().unwrap_or(0)
    })
}

fn aligned(rows: &[[String; 8]]) -> Vec<String> {
    let widths = widths(rows);
    let heads = RANK_HEADS.map(str::to_owned);
    let line = |row: &[String; 8]| {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let width = widths[column];
            match RANK_NUMBERS[column] {
                true => format!("{cell:>width$}"),
                false => format!("{cell:<width$}"),
            }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    [&heads].into_iter().chain(rows).map(line).collect()
}

/// `12 s`, `3:05`, `1:02:03`.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{rest} s"),
        (0, _) => format!("{minutes}:{rest:02}"),
        _ => format!("{hours}:{minutes:02}:{rest:02}"),
    }
}
