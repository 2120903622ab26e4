//! The run on a terminal, drawn anew every second; `q`, Escape or Ctrl-C end it. The run itself is
//! not touched.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Alignment, Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Cell, Gauge, Paragraph, Row, Table, Wrap};

use super::View;
use super::socket::{self, Source};
use super::text::{self, RANK_HEADS, RANK_NUMBERS, rank_cells};
use crate::job::table::JobState;

/// A rank that was quiet for longer stands out.
const LONG_QUIET: f32 = 10.0;

/// Shows a run until the user has seen enough.
pub fn run(mut source: Source, pause: Duration) -> Result<()> {
    let mut terminal = ratatui::try_init().context("cannot draw on this terminal")?;
    let shown = (|| -> Result<()> {
        let mut has_ended = false;
        loop {
            terminal.draw(|frame| draw(frame, &source.view, has_ended)).context("cannot draw")?;
            if wait_for_end(pause)? {
                return Ok(());
            }
            if has_ended {
                continue;
            }
            match socket::ask(&source.path) {
                Ok(view) => source.view = view,
                // The last table stays on the screen.
                Err(_) => has_ended = true,
            }
        }
    })();
    ratatui::try_restore().context("cannot give the terminal back")?;
    shown
}

/// Waits; true when the user ends it. Another key, or a new size, draws anew at once.
fn wait_for_end(pause: Duration) -> Result<bool> {
    let start = Instant::now();
    let rest = || pause.saturating_sub(start.elapsed());
    if !event::poll(rest()).context("cannot read keys")? {
        return Ok(false);
    }
    let Event::Key(key) = event::read().context("cannot read keys")? else { return Ok(false) };
    let is_interrupt =
        key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    let ends = is_interrupt || matches!(key.code, KeyCode::Char('q' | 'Q') | KeyCode::Esc);
    Ok(ends && key.kind == KeyEventKind::Press)
}

/// Draws a run.
pub fn draw(frame: &mut Frame<'_>, view: &View, has_ended: bool) {
    let dim = Style::new().add_modifier(Modifier::DIM);
    let progress = text::progress(view);
    let restarts = restart_text(view);
    let notes = text::node_lines(view);
    let width = usize::from(frame.area().width.max(1));
    let wrapped: usize =
        restarts.lines.iter().map(|line| line.width().div_ceil(width).max(1)).sum();
    let [head, bar, ranks, below, last, foot] = Layout::vertical([
        Constraint::Length(3),
        Constraint::Length(u16::from(progress.is_some())),
        Constraint::Min(3),
        Constraint::Length(notes.len() as u16),
        Constraint::Length(wrapped as u16),
        Constraint::Length(1),
    ])
    .areas(frame.area());

    let state = if has_ended { "has ended" } else { view.table.state.name() };
    let title = text::title(view).replacen(view.table.state.name(), state, 1);
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let mut lines = vec![
        Line::from(vec![
            Span::styled("lorarun top   ", dim),
            Span::styled(title, bold.fg(color_of(view.table.state, has_ended))),
        ]),
        Line::styled(view.command.clone(), dim),
    ];
    lines.extend(progress.map(Line::from));
    frame.render_widget(Paragraph::new(lines), head);
    if let Some((step, steps)) = text::steps_of(view) {
        let ratio = (step as f64 / steps as f64).clamp(0.0, 1.0);
        let gauge = Gauge::default().ratio(ratio).gauge_style(Style::new().fg(Color::Green));
        frame.render_widget(gauge, bar);
    }
    frame.render_widget(rank_table(view), ranks);
    frame.render_widget(Paragraph::new(notes.join("\n")).style(Color::Yellow), below);
    frame.render_widget(Paragraph::new(restarts).wrap(Wrap { trim: false }), last);
    let keys = "q ends this view, the run goes on";
    let hidden = view.table.ranks.len().saturating_sub(usize::from(ranks.height.saturating_sub(1)));
    let foot_text = match hidden {
        0 => keys.to_owned(),
        count => format!("{keys}   ranks that do not fit: {count}"),
    };
    frame.render_widget(Paragraph::new(foot_text).style(dim), foot);
}

fn color_of(state: JobState, has_ended: bool) -> Color {
    match state {
        _ if has_ended => Color::Gray,
        JobState::Running => Color::Green,
        JobState::Gathering | JobState::Halting => Color::Yellow,
        JobState::Over => Color::Gray,
    }
}

fn rank_table(view: &View) -> Table<'static> {
    let rows: Vec<[String; 8]> = view.table.ranks.iter().map(rank_cells).collect();
    let widths = text::widths(&rows).map(|width| Constraint::Length(width as u16));
    let cell = |column: usize, content: String| {
        let side = if RANK_NUMBERS[column] { Alignment::Right } else { Alignment::Left };
        Cell::from(Text::from(content).alignment(side))
    };
    let row = |cells: [String; 8]| {
        Row::new(cells.into_iter().enumerate().map(move |(column, content)| cell(column, content)))
    };
    let head = Style::new().add_modifier(Modifier::UNDERLINED);
    let body: Vec<Row<'static>> = rows
        .into_iter()
        .zip(&view.table.ranks)
        .map(|(cells, rank)| match rank.quiet_s > LONG_QUIET {
            true => row(cells).style(Color::Yellow),
            false => row(cells),
        })
        .collect();
    Table::new(body, widths)
        .header(row(RANK_HEADS.map(str::to_owned)).style(head))
        .column_spacing(2)
}

fn restart_text(view: &View) -> Text<'static> {
    let lines = text::restart_lines(view);
    if lines.is_empty() {
        return Text::default();
    }
    let mut all = vec![
        Line::default(),
        Line::styled(
            format!("started again: {}", view.table.restarts.len()),
            Style::new().add_modifier(Modifier::BOLD),
        ),
    ];
    all.extend(lines.into_iter().map(|line| Line::from(format!("  {line}"))));
    Text::from(all)
}
