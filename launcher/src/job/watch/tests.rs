//! What the watch learns, and whom it names.

use super::*;

/// Two ranks on two nodes with a clock; a rank that lives shows it every half second.
struct Scene {
    watch: Watch,
    now: Duration,
    reports: [RankReport; 2],
}

impl Scene {
    fn new(phase: Phase) -> Scene {
        let standing = Standing { phase, ..Standing::default() };
        let reports = [0, 1].map(|rank| RankReport::new(rank, 10 + rank as i32, &standing, false));
        Scene { watch: Watch::new(None), now: Duration::ZERO, reports }
    }

    fn pass(&mut self, seconds: f64, alive: [bool; 2]) {
        let end = self.now + Duration::from_secs_f64(seconds);
        while self.now < end {
            self.now += Duration::from_millis(500);
            for (rank, alive) in alive.into_iter().enumerate() {
                self.reports[rank].changes += u64::from(alive);
                let report = vec![self.reports[rank].clone()];
                self.watch.take((rank, "host"), report, self.now);
            }
        }
    }

    fn verdict(&self) -> Option<usize> {
        self.watch.verdict(self.now).map(|verdict| verdict.rank)
    }
}

#[test]
fn deadlines_are_learnt_and_have_floors() {
    let mut scene = Scene::new(Phase::Training);
    let seconds = |scene: &Scene| scene.watch.deadline(Phase::Training).as_secs_f64();
    assert_eq!(seconds(&scene), 1800.0);
    scene.pass(20.0, [true, true]);
    assert_eq!(seconds(&scene), 60.0);
    // A step that takes 8 s.
    scene.pass(7.5, [false, true]);
    scene.pass(1.0, [true, true]);
    assert_eq!(seconds(&scene), 80.0);
    // First steps are slow again; what was seen stays.
    scene.watch.begin();
    assert_eq!(seconds(&scene), 1800.0);
    scene.pass(20.0, [true, true]);
    assert_eq!(seconds(&scene), 80.0);
    assert_eq!(scene.watch.deadline(Phase::Loading).as_secs(), 900);
}

#[test]
fn what_was_asked_for_holds_in_every_phase() {
    let watch = Watch::new(Some(Duration::from_secs(5)));
    assert!(Phase::ALL.into_iter().all(|phase| watch.deadline(phase).as_secs() == 5));
}

#[test]
fn who_waits_inside_is_no_suspect_while_one_is_outside() {
    let mut scene = Scene::new(Phase::Training);
    scene.pass(20.0, [true, true]);
    (scene.reports[0].entered, scene.reports[0].is_inside) = (5, true);
    scene.reports[1].entered = 4;
    // The rank outside shows life for long: it works.
    scene.pass(200.0, [false, true]);
    assert_eq!(scene.verdict(), None);
    scene.pass(59.0, [false, false]);
    assert_eq!(scene.verdict(), None);
    scene.pass(2.0, [false, false]);
    assert_eq!(scene.verdict(), Some(1));
    let lines = scene.watch.flight_lines(scene.now);
    assert!(lines[0].starts_with("rank 1 never entered `collective` number 5"), "{lines:?}");
}

#[test]
fn a_long_phase_of_one_rank_gives_it_time_while_the_others_wait() {
    let mut scene = Scene::new(Phase::Training);
    scene.pass(20.0, [true, true]);
    (scene.reports[1].entered, scene.reports[1].is_inside) = (5, true);
    scene.reports[0].phase = Phase::Saving;
    scene.pass(500.0, [false, false]);
    assert_eq!(scene.verdict(), None);
    scene.pass(110.0, [false, false]);
    assert_eq!(scene.verdict(), Some(0));
}

#[test]
fn when_all_wait_inside_the_one_that_is_behind_is_named() {
    let mut scene = Scene::new(Phase::Training);
    scene.pass(20.0, [true, true]);
    for (report, entered) in scene.reports.iter_mut().zip([5, 4]) {
        (report.entered, report.is_inside) = (entered, true);
    }
    scene.pass(59.0, [false, false]);
    assert_eq!(scene.verdict(), None);
    scene.pass(2.0, [false, false]);
    assert_eq!(scene.verdict(), Some(1));
}

#[test]
fn a_stopped_process_hangs_after_seconds() {
    let mut scene = Scene::new(Phase::Loading);
    scene.reports[1].is_stopped = true;
    scene.pass(3.0, [true, false]);
    assert_eq!(scene.verdict(), None);
    // It was let go on.
    scene.reports[1].is_stopped = false;
    scene.pass(3.0, [true, true]);
    scene.reports[1].is_stopped = true;
    scene.pass(5.0, [true, false]);
    assert_eq!(scene.verdict(), None);
    scene.pass(1.0, [true, false]);
    assert_eq!(scene.verdict(), Some(1));
}

#[test]
fn ranks_that_have_ended_are_forgotten() {
    let mut scene = Scene::new(Phase::Training);
    scene.pass(1.0, [true, true]);
    scene.watch.take((1, "host"), Vec::new(), scene.now);
    assert_eq!(scene.watch.rows(scene.now).len(), 1);
    scene.watch.forget(0);
    assert_eq!(scene.watch.rows(scene.now), []);
}

#[test]
fn a_row_shows_the_share_of_waiting() {
    let mut scene = Scene::new(Phase::Training);
    scene.pass(0.5, [true, true]);
    for _ in 0..12 {
        scene.reports[1].waited_ms += 250;
        scene.pass(0.5, [true, true]);
    }
    let rows = scene.watch.rows(scene.now);
    assert_eq!((rows[0].wait_share, rows[1].wait_share), (Some(0.0), Some(0.5)));
    assert_eq!((rows[1].loss, rows[1].images_per_second), (Some(0.0), None));
}
