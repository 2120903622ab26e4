//! What is drawn, what is printed, and who is answered.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use collectives::Phase;
use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::*;
use crate::job::table::{NodeRow, RankRow, Restart, SharedTable};

fn rank(number: usize, host: &str) -> RankRow {
    RankRow {
        node: number / 2,
        host: host.to_owned(),
        rank: number,
        pid: 4000 + number as i32,
        phase: Phase::Training,
        step: 120,
        steps: 2000,
        loss: Some(0.09123),
        images_per_second: Some(3.4),
        wait_share: Some(0.12),
        is_waiting: number == 1,
        quiet_s: if number == 1 { 12.5 } else { 0.3 },
    }
}

fn view() -> View {
    let node = |node: usize, host: &str| NodeRow {
        node,
        host: host.to_owned(),
        processes: 1,
        is_running: node == 0,
        quiet_s: if node == 0 { 0.2 } else { 2.5 },
    };
    View {
        version: "0.1.0".to_owned(),
        pid: 77,
        host: "gpu0".to_owned(),
        command: "train night.toml".to_owned(),
        steps_per_second: Some(0.85),
        table: Table {
            job: "night".to_owned(),
            generation: 2,
            state: JobState::Running,
            elapsed_s: 753.0,
            nodes_wanted: (1, 2),
            nodes: vec![node(0, "gpu0"), node(1, "gpu1")],
            ranks: vec![rank(0, "gpu0"), rank(1, "gpu0")],
            restarts: vec![Restart {
                generation: 1,
                at_s: 192.0,
                reason: "rank 3 on node 1 (gpu1) was killed by signal 9".to_owned(),
                cause: None,
                from_step: Some(100),
            }],
            kept_step: Some(100),
        },
    }
}

/// What a terminal of this size shows.
fn drawn(view: &View, (width, height): (u16, u16), has_ended: bool) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| screen::draw(frame, view, has_ended)).unwrap();
    let buffer = terminal.backend().buffer().clone();
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    (0..height).map(|y| line(y).trim_end().to_owned()).collect()
}

#[test]
fn plain_text_says_all_of_it() {
    let expected = "\
night   running   nodes: 2 of 1 to 2   ranks: 2   for 12:33
train night.toml
step 120 of 2000   0.85 it/s   3.40 images/s   loss 0.0912   36:51 left   kept in memory: step 100

rank  host  process  doing                step    loss  waiting   quiet
   0  gpu0     4000  training         120/2000  0.0912     12 %   0.3 s
   1  gpu0     4001  training, waits  120/2000  0.0912     12 %  12.5 s
node 1 (gpu1) waits, runs nothing, not heard from for 2.5 s

started again: 1
  3:12 after start 1, from step 100: rank 3 on node 1 (gpu1) was killed by signal 9
";
    assert_eq!(text::table(&view()), expected);
}

#[test]
fn the_terminal_shows_the_same() {
    let lines = drawn(&view(), (100, 14), false);
    let shows = |at: usize, words: &str| assert!(lines[at].contains(words), "{at}: {lines:#?}");
    shows(0, "lorarun top   night   running   nodes: 2 of 1 to 2   ranks: 2   for 12:33");
    shows(1, "train night.toml");
    shows(2, "step 120 of 2000   0.85 it/s");
    shows(3, "6%");
    assert_eq!(lines[4], "rank  host  process  doing                step    loss  waiting   quiet");
    assert_eq!(lines[6], "   1  gpu0     4001  training, waits  120/2000  0.0912     12 %  12.5 s");
    shows(9, "node 1 (gpu1) waits, runs nothing");
    shows(11, "started again: 1");
    shows(12, "3:12 after start 1, from step 100: rank 3");
    shows(13, "q ends this view, the run goes on");
    assert!(drawn(&view(), (100, 14), true)[0].contains("night   has ended"));
}

#[test]
fn no_terminal_is_too_small() {
    let mut many = view();
    many.table.ranks = (0..40).map(|number| rank(number, "gpu0")).collect();
    for size in [(1, 1), (20, 5), (40, 10), (100, 12)] {
        drawn(&many, size, false);
    }
    let lines = drawn(&many, (100, 20), false);
    assert!(lines[19].contains("ranks that do not fit: 30"), "{lines:#?}");
    drawn(&View::default(), (80, 24), false);
    assert!(text::table(&View::default()).starts_with("0   gathering   ranks: 0   for 0 s\n"));
}

#[test]
fn times_are_short() {
    for (seconds, shown) in [(0.4, "0 s"), (59.9, "59 s"), (185.0, "3:05"), (3723.0, "1:02:03")] {
        assert_eq!(text::duration(seconds), shown);
    }
}

#[test]
fn a_launcher_shows_its_run_and_leaves_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("runs");
    let table = SharedTable::default();
    table.set(view().table);
    let server =
        server::serve_in(&folder, table, "night/1", "train night.toml".to_owned()).unwrap();
    assert_eq!(folder.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    // One whose launcher is gone; process numbers end long before this one.
    let stale = folder.join("old.2147483646.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let found = socket::find_in(&folder).unwrap();
    assert_eq!((found.runs.len(), found.foreign, stale.exists()), (1, 0, false));
    let shown = &found.runs[0];
    assert_eq!(shown.path, folder.join(format!("night_1.{}.sock", std::process::id())));
    assert_eq!(shown.view.table, view().table);
    assert_eq!(shown.view.command, "train night.toml");
    drop(server);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
    assert!(socket::ask(&shown.path).is_err());
    assert_eq!(socket::find_in(Path::new("/nowhere")).unwrap().runs.len(), 0);
}

#[test]
fn a_folder_that_others_may_enter_is_not_used() {
    let parent = tempfile::tempdir().unwrap();
    let open = parent.path().join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o755)).unwrap();
    assert!(socket::claim(&open).unwrap_err().to_string().contains("mode 700"));
    let link = parent.path().join("link");
    std::os::unix::fs::symlink(&open, &link).unwrap();
    assert!(socket::claim(&link).is_err());
    let own = parent.path().join("own");
    socket::claim(&own).unwrap();
    socket::claim(&own).unwrap();
}

#[test]
fn several_runs_are_listed_in_words() {
    let source = |job: &str, pid| {
        let mut view = View { pid, ..view() };
        view.table.job = job.to_owned();
        Source { path: "s".into(), view }
    };
    let found = |runs| Found { runs, foreign: 0 };
    let both = || vec![source("night", 77), source("", 78)];
    assert_eq!(choose(found(vec![source("", 5)]), None).unwrap().view.pid, 5);
    assert_eq!(choose(found(both()), Some("night")).unwrap().view.pid, 77);
    assert_eq!(choose(found(both()), Some("78")).unwrap().view.pid, 78);
    assert_eq!(
        choose(found(both()), None).unwrap_err(),
        "several runs are going on; choose one\n  \
         lorarun top --job night    running, ranks: 2, step 120: train night.toml\n  \
         lorarun top --job 78    running, ranks: 2, step 120: train night.toml"
    );
    let none = choose(found(both()), Some("day")).unwrap_err();
    assert!(none.starts_with("error: no run of this name on this machine: day\n"), "{none}");
    let none = choose(Found::default(), None).unwrap_err();
    assert!(none.starts_with("no run of yours is going on"), "{none}");
}
