//! Jobs of three nodes with two processes each, told second by second.

use super::*;
use crate::job::watch::RankReport;

fn policy() -> Policy {
    Policy {
        nodes: (2, 3),
        join_wait: Duration::from_secs(60),
        rejoin_wait: Duration::from_secs(20),
        max_restarts: 2,
        silence: Duration::from_secs(3),
        merge: Duration::from_secs(2),
        halt_wait: Duration::from_secs(8),
        hang_timeout: Some(Duration::from_secs(10)),
    }
}

fn facts(host: &str) -> Facts {
    let (build, config) = ("abc".to_owned(), "123".to_owned());
    Facts { host: host.to_owned(), processes: 2, build, config, life: 7 }
}

/// A job with a clock.
struct Job {
    coordinator: Coordinator,
    now: Duration,
    /// What all nodes have in memory.
    kept: Option<Moment>,
}

impl Job {
    fn new(policy: Policy) -> Job {
        let coordinator = Coordinator::new(policy, 0, Duration::ZERO);
        Job { coordinator, now: Duration::ZERO, kept: None }
    }

    fn take(&mut self, event: Event) -> Vec<Action> {
        self.coordinator.take(event, self.now)
    }

    /// Half seconds pass; nodes of `alive` beat. Gives all that was done.
    fn pass(&mut self, seconds: f64, alive: &[usize]) -> Vec<Action> {
        let mut actions = Vec::new();
        let end = self.now + Duration::from_secs_f64(seconds);
        while self.now < end {
            self.now += Duration::from_millis(500);
            for node in alive {
                let news = News { kept: self.kept, ..News::default() };
                actions.extend(self.take(Event::Beat { node: *node, news }));
            }
            actions.extend(self.take(Event::Tick));
        }
        actions
    }

    fn join(&mut self, node: usize) -> Vec<Action> {
        self.join_as(node, facts(&format!("h{node}")))
    }

    fn join_as(&mut self, node: usize, facts: Facts) -> Vec<Action> {
        self.take(Event::Joined { node, facts, skew: 0.1 })
    }

    /// Three nodes, started.
    fn running() -> Job {
        let mut job = Job::new(policy());
        job.join(0);
        job.join(2);
        let actions = job.join(1);
        assert_eq!(starts(&actions), [(0, 1, 0, 6), (1, 1, 2, 6), (2, 1, 4, 6)]);
        job
    }

    fn ended(&mut self, node: usize, generation: u64, code: i32) -> Vec<Action> {
        self.take(Event::Ended { node, generation, code, failure: None })
    }

    fn failed(&mut self, node: usize, generation: u64, rank: usize, code: i32) -> Vec<Action> {
        self.take(Event::Failed { node, generation, failure: failure(rank, code) })
    }
}

fn failure(rank: usize, code: i32) -> Failure {
    let how = format!("ended with exit code {code}");
    let cause = format!("ranks that end with exit code {code}");
    Failure { rank: Some(rank), code, how, cause, blames: None }
}

fn starts(actions: &[Action]) -> Vec<(usize, u64, usize, usize)> {
    let start = |action: &Action| match action {
        Action::Start { node, generation, first_rank, world_size, .. } => {
            Some((*node, *generation, *first_rank, *world_size))
        }
        _ => None,
    };
    actions.iter().filter_map(start).collect()
}

fn halted(actions: &[Action]) -> Vec<usize> {
    let halt = |action: &Action| match action {
        Action::Halt { node, .. } => Some(*node),
        _ => None,
    };
    actions.iter().filter_map(halt).collect()
}

fn finish(actions: &[Action]) -> Option<i32> {
    actions.iter().find_map(|action| match action {
        Action::Finish { code } => Some(*code),
        _ => None,
    })
}

fn said(actions: &[Action]) -> String {
    let say = |action: &Action| match action {
        Action::Say(line) => Some(line.clone()),
        _ => None,
    };
    actions.iter().filter_map(say).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_job_ends_when_all_its_nodes_have_ended() {
    let mut job = Job::running();
    assert_eq!(job.pass(100.0, &[0, 1, 2]), []);
    assert_eq!(job.ended(0, 1, 0), []);
    assert_eq!(job.ended(2, 1, 0), []);
    assert_eq!(finish(&job.ended(1, 1, 0)), Some(0));
    // Nothing happens to a job that is over.
    assert_eq!(job.join(0), []);
}

#[test]
fn the_least_number_starts_when_the_wait_is_over() {
    let mut job = Job::new(policy());
    job.join(0);
    job.join(2);
    let actions = job.pass(59.0, &[0, 2]);
    assert_eq!(starts(&actions), []);
    assert!(said(&actions).starts_with("waiting for node 1 (2 of 3 nodes are there), 3 s"));
    assert_eq!(starts(&job.pass(2.0, &[0, 2])), [(0, 1, 0, 4), (2, 1, 2, 4)]);
}

#[test]
fn too_few_nodes_end_the_job_so_that_it_is_tried_again() {
    let mut job = Job::new(policy());
    job.join(0);
    let actions = job.pass(61.0, &[0]);
    assert_eq!(finish(&actions), Some(exit_code::REQUEUE));
    assert!(said(&actions).contains("1 of at least 2 nodes have come"), "{}", said(&actions));
    assert!(said(&actions).contains("missing: nodes 1, 2\nhint: "), "{}", said(&actions));
}

#[test]
fn a_failed_rank_halts_all_and_all_start_again() {
    let mut job = Job::running();
    job.pass(5.0, &[0, 1, 2]);
    let actions = job.failed(1, 1, 3, 137);
    assert_eq!(halted(&actions), [0, 1, 2]);
    assert!(said(&actions).starts_with("rank 3 on node 1 (h1) ended with exit code 137"));
    // What the halt itself does to others is no failure of theirs.
    assert_eq!(job.failed(0, 1, 0, 1), []);
    for node in 0..3 {
        assert_eq!(starts(&job.ended(node, 1, 143)), []);
    }
    let actions = job.pass(2.5, &[0, 1, 2]);
    assert_eq!(starts(&actions), [(0, 2, 0, 6), (1, 2, 2, 6), (2, 2, 4, 6)]);
    let expected = "starting again after rank 3 on node 1 (h1) ended with exit code 137, and 1 more \
                    failures: 1 of 2 restarts for ranks that end with exit code 137, nothing is kept";
    assert!(said(&actions).starts_with(expected), "{}", said(&actions));
    // Late words of the first start change nothing.
    assert_eq!(job.failed(2, 1, 5, 1), []);
    assert_eq!(job.ended(2, 1, 0), []);
}

#[test]
fn restarts_are_counted_by_cause_and_end_the_job_when_used_up() {
    let mut job = Job::running();
    for generation in 1..=3 {
        job.pass(5.0, &[0, 1, 2]);
        let mut actions = job.failed(0, generation, 0, 9);
        (0..3).for_each(|node| actions.extend(job.ended(node, generation, 143)));
        actions.extend(job.pass(2.5, &[0, 1, 2]));
        if generation < 3 {
            assert_eq!(starts(&actions).len(), 3, "{generation}");
        } else {
            assert_eq!(finish(&actions), Some(9));
            assert!(said(&actions).contains("used up: 2"), "{}", said(&actions));
        }
    }
}

#[test]
fn wrong_usage_is_never_tried_again() {
    for code in [exit_code::USAGE, exit_code::CONFIGURATION] {
        let mut job = Job::running();
        let mut actions = job.failed(0, 1, 0, code);
        (0..3).for_each(|node| actions.extend(job.ended(node, 1, code)));
        actions.extend(job.pass(2.5, &[0, 1, 2]));
        assert_eq!(finish(&actions), Some(code));
    }
}

#[test]
fn a_silent_node_is_gone_and_the_others_go_on_without_it() {
    let mut job = Job::running();
    let actions = job.pass(4.0, &[0, 1]);
    assert_eq!(halted(&actions), [0, 1]);
    assert!(said(&actions).starts_with("node 2 (h2) is gone: not heard from for 3.0 s"));
    job.ended(0, 1, 143);
    job.ended(1, 1, 143);
    let actions = job.pass(19.0, &[0, 1]);
    assert_eq!(starts(&actions), []);
    let actions = job.pass(4.0, &[0, 1]);
    assert_eq!(starts(&actions), [(0, 2, 0, 4), (1, 2, 2, 4)]);
    assert!(said(&actions).contains("going on with 4 of 6 ranks, without node 2"), "{actions:?}");
}

#[test]
fn a_node_that_comes_back_in_time_is_taken_in() {
    let mut job = Job::running();
    assert_eq!(halted(&job.take(Event::Lost { node: 1 })), [0, 2]);
    job.ended(0, 1, 143);
    job.ended(2, 1, 143);
    assert_eq!(starts(&job.pass(5.0, &[0, 2])), []);
    assert_eq!(starts(&job.join(1)), [(0, 2, 0, 6), (1, 2, 2, 6), (2, 2, 4, 6)]);
}

#[test]
fn nodes_lost_within_two_seconds_are_one_restart() {
    let mut job = Job::running();
    job.take(Event::Lost { node: 1 });
    job.pass(1.0, &[0, 2]);
    job.take(Event::Lost { node: 2 });
    job.ended(0, 1, 143);
    let actions = job.pass(2.0, &[0]);
    let expected = "after node 1 (h1) is gone: its connection ended, and 1 more failures: 1 of 2";
    assert!(said(&actions).contains(expected), "{actions:?}");
    assert_eq!(job.coordinator.generation, 1);
}

#[test]
fn a_node_that_does_not_halt_is_left_behind() {
    let mut job = Job::running();
    job.failed(0, 1, 0, 1);
    job.ended(0, 1, 1);
    job.ended(1, 1, 143);
    let actions = job.pass(8.5, &[0, 1, 2]);
    assert!(said(&actions).contains("node 2 is left behind"), "{}", said(&actions));
    let actions = job.pass(21.0, &[0, 1]);
    assert_eq!(starts(&actions), [(0, 2, 0, 4), (1, 2, 2, 4)]);
}

#[test]
fn a_request_to_stop_reaches_all_ranks_once_and_ends_the_job() {
    let mut job = Job::running();
    let actions = job.take(Event::StopAsked { why: "SIGTERM on node 1".to_owned() });
    let stopped = actions.iter().filter(|action| matches!(action, Action::Stop { .. })).count();
    assert_eq!(stopped, 3);
    assert_eq!(job.take(Event::StopAsked { why: "SIGUSR1 on node 2".to_owned() }), []);
    for node in [0, 1] {
        assert_eq!(job.ended(node, 1, exit_code::REQUEUE), []);
    }
    assert_eq!(finish(&job.ended(2, 1, exit_code::REQUEUE)), Some(exit_code::REQUEUE));
    // A job that gathers has nothing to save.
    let mut job = Job::new(policy());
    job.join(0);
    let actions = job.take(Event::StopAsked { why: "SIGTERM".to_owned() });
    assert_eq!(finish(&actions), Some(exit_code::REQUEUE));
}

#[test]
fn who_does_not_belong_is_told_why() {
    let mut job = Job::new(policy());
    job.join(0);
    let refused = |actions: Vec<Action>| match &actions[..] {
        [Action::Refuse { why, .. }] => why.clone(),
        other => panic!("{other:?}"),
    };
    let mut second = facts("h0");
    second.life = 8;
    assert!(
        refused(job.join_as(0, second))
            .contains("two launchers say that they are node 0, on h0 and h0")
    );
    assert!(refused(job.join(3)).contains("nodes 0 to 2, this is: 3"));
    let mut other = facts("h1");
    other.build = "def".to_owned();
    let why = refused(job.join_as(1, other));
    assert!(why.starts_with("its build differs from that of node 0: def instead of abc\nhint: "));
    let mut other = facts("h1");
    other.processes = 4;
    let why = refused(job.join_as(1, other));
    assert!(why.starts_with("its number of processes differs from that of node 0: 4 instead of 2"));
    let mut other = facts("h1");
    other.config = "456".to_owned();
    let why = refused(job.join_as(1, other));
    assert!(why.starts_with("its config differs from that of node 0: 456 instead of 123\nhint: "));
}

/// What nodes 0 and 1 of a job of two nodes with one rank each say of them.
fn report(rank: usize, changes: u64, entered: u64, is_inside: bool) -> RankReport {
    let standing = collectives::Standing { changes, entered, is_inside, ..Default::default() };
    RankReport::new(rank, 100 + rank as i32, &standing, false)
}

#[test]
fn a_failure_that_blames_a_rank_elsewhere_makes_way_for_that_one() {
    let mut job = Job::running();
    let consequence = Failure { blames: Some(5), ..failure(0, 1) };
    let actions = job.take(Event::Failed { node: 0, generation: 1, failure: consequence });
    assert_eq!((halted(&actions), said(&actions)), (vec![0, 1, 2], String::new()));
    job.failed(2, 1, 5, 137);
    (0..3).for_each(|node| drop(job.ended(node, 1, 1)));
    let actions = job.pass(2.5, &[0, 1, 2]);
    assert!(
        said(&actions).starts_with("starting again after rank 5 on node 2 (h2)"),
        "{actions:?}"
    );
    let restarts = job.coordinator.table(job.now).restarts;
    assert_eq!(restarts[0].cause.as_deref(), Some("ranks that end with exit code 137"));
}

#[test]
fn where_nothing_may_start_again_the_end_is_not_delayed() {
    let mut job = Job::new(Policy { nodes: (1, 1), max_restarts: 0, ..policy() });
    assert_eq!(starts(&job.join(0)), [(0, 1, 0, 2)]);
    assert_eq!(said(&job.failed(0, 1, 1, 7)), "");
    // The last word of a node counts: another of its ranks was the first.
    let (failure, generation) = (Some(failure(0, 9)), 1);
    let actions = job.take(Event::Ended { node: 0, generation, code: 9, failure });
    assert_eq!(actions, [Action::Finish { code: 9 }]);
}

#[test]
fn who_ends_a_node_at_once_ends_the_job() {
    let mut job = Job::running();
    job.take(Event::StopAsked { why: "SIGINT on node 1".to_owned() });
    assert_eq!(halted(&job.ended(1, 1, 130)), [0, 2]);
    job.ended(0, 1, 1);
    assert_eq!(finish(&job.ended(2, 1, 1)), Some(130));
}

#[test]
fn a_message_says_from_which_step_it_goes_on() {
    let mut job = Job::running();
    job.kept = Some(Moment { generation: 1, step: 40 });
    job.pass(1.0, &[0, 1, 2]);
    job.failed(1, 1, 2, 137);
    (0..3).for_each(|node| drop(job.ended(node, 1, 1)));
    let actions = job.pass(2.5, &[0, 1, 2]);
    assert!(said(&actions).ends_with(", going on from step 40 kept in memory"), "{actions:?}");
    assert_eq!(job.coordinator.table(job.now).restarts[0].from_step, Some(40));
}

#[test]
fn a_node_that_comes_late_takes_part_from_the_next_snapshot_on() {
    let mut job = Job::new(policy());
    job.join(0);
    job.join(2);
    assert_eq!(starts(&job.pass(61.0, &[0, 2])).len(), 2);
    job.kept = Some(Moment { generation: 1, step: 20 });
    job.pass(1.0, &[0, 2]);
    assert!(said(&job.join(1)).starts_with("node 1 (h1) has come"));
    assert!(halted(&job.pass(5.0, &[0, 1, 2])).is_empty());
    job.kept = Some(Moment { generation: 1, step: 40 });
    let actions = job.pass(0.5, &[0, 1, 2]);
    assert_eq!(halted(&actions), [0, 2]);
    assert!(said(&actions).starts_with("node 1 is back: all ranks start again"), "{actions:?}");
    job.ended(0, 1, 1);
    // At once, and it costs no restart.
    assert_eq!(starts(&job.ended(2, 1, 1)), [(0, 2, 0, 6), (1, 2, 2, 6), (2, 2, 4, 6)]);
    assert!(job.coordinator.restarts.is_empty());
    assert_eq!(job.coordinator.table(job.now).restarts.len(), 1);
}

#[test]
fn the_same_launcher_may_come_again_and_another_one_must_wait_for_its_death() {
    let mut job = Job::running();
    let mut second = facts("h1");
    second.life = 8;
    assert!(matches!(job.join_as(1, second.clone())[..], [Action::Refuse { node: 1, .. }]));
    job.pass(2.0, &[0, 2]);
    assert_eq!(job.join_as(1, second.clone()), [Action::Later { node: 1 }]);
    // The one that runs has lost its connection; its ranks have ended for that reason.
    assert_eq!(halted(&job.join(1)), [0, 2]);
    job.ended(0, 1, 1);
    job.ended(2, 1, 1);
    assert_eq!(starts(&job.pass(2.5, &[0, 1, 2])).len(), 3);
    job.take(Event::Lost { node: 1 });
    job.ended(0, 2, 1);
    job.ended(2, 2, 1);
    job.join_as(1, second);
    assert_eq!(starts(&job.pass(2.5, &[0, 1, 2])).len(), 3);
}

#[test]
fn without_node_0_nothing_starts() {
    let mut job = Job::new(policy());
    job.join(1);
    job.join(2);
    assert_eq!(starts(&job.pass(59.5, &[1, 2])), []);
}

#[test]
fn clocks_that_differ_are_told() {
    let mut job = Job::new(policy());
    let actions = job.take(Event::Joined { node: 1, facts: facts("h1"), skew: -5.25 });
    let expected = "warning: the clock of node 1 (h1) is 5.2 s behind that of node 0\nhint: ";
    assert!(said(&actions).starts_with(expected), "{actions:?}");
}

#[test]
fn a_node_whose_ranks_have_ended_well_may_go() {
    let mut job = Job::running();
    job.ended(1, 1, 0);
    assert!(halted(&job.take(Event::Lost { node: 1 })).is_empty());
    job.ended(0, 1, 0);
    assert_eq!(finish(&job.ended(2, 1, 0)), Some(0));
}

#[test]
fn a_rank_that_hangs_is_named_with_what_the_others_wait_in() {
    let mut job = Job::new(Policy { nodes: (2, 2), ..policy() });
    job.join(0);
    job.join(1);
    let mut actions = Vec::new();
    for second in 0..15 {
        job.now += Duration::from_secs(1);
        for node in 0..2 {
            let is_inside = node == 0;
            let changes = second.min(3);
            let ranks = vec![report(node, changes, 7 - node as u64, is_inside)];
            let news = News { generation: 1, ranks, kept: None };
            job.take(Event::Beat { node, news });
        }
        actions.extend(job.take(Event::Tick));
    }
    let said = said(&actions);
    assert!(
        said.starts_with("error: rank 1 on node 1 (h1) hangs: no sign of life for 1"),
        "{said}"
    );
    assert!(said.contains("rank 1 never entered `collective` number 7, in which 1 wait"), "{said}");
    assert_eq!(halted(&actions), [0, 1]);
    let keep = |action: &Action| matches!(action, Action::Halt { keep_flights: true, .. });
    assert!(actions.iter().any(keep));
    assert_eq!(job.coordinator.table(job.now).ranks[1].quiet_s, 11.0);
}
