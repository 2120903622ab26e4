//! The turns of a job: when gathering becomes a start, halting another one, and running the end.

use super::{
    Action, Coordinator, Duration, Failure, Phase, Restart, State, Why, exit_code, is_final, who,
};

/// The first line that says who is waited for comes after this time.
const SAY_FIRST: Duration = Duration::from_secs(3);
/// Between two such lines.
const SAY: Duration = Duration::from_secs(10);

impl Coordinator {
    /// Changes the phase when its end is reached.
    pub(super) fn go_on(&mut self, now: Duration, actions: &mut Vec<Action>) {
        match self.phase.clone() {
            Phase::Gathering { since, said } => self.gather((since, said), now, actions),
            Phase::Running { waiting_since } => {
                let running = self.members.values().filter(|m| m.state != State::Ready);
                let codes: Option<Vec<i32>> = running
                    .map(|member| match member.state {
                        State::Ended(code) => Some(code),
                        _ => None,
                    })
                    .collect();
                if let Some(code) = codes.and_then(|codes| codes.into_iter().max()) {
                    // Well or saved: a failure would have halted the job.
                    self.finish(code, actions);
                } else if waiting_since.is_some_and(|since| self.kept() > since) {
                    self.take_in(now, actions);
                }
            }
            Phase::Halting { since, why } => self.halt(since, why, now, actions),
            Phase::Over => {}
        }
    }

    /// Nodes wait to take part, and a snapshot was just taken.
    fn take_in(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let waiting = self.members.iter().filter(|(_, member)| member.state == State::Ready);
        let waiting: Vec<usize> = waiting.map(|(node, _)| *node).collect();
        let ending = self.members.values().any(|member| matches!(member.state, State::Ended(_)));
        if waiting.is_empty() || ending || self.stopping {
            // It went again, or comes too late.
            self.phase = Phase::Running { waiting_since: None };
            return;
        }
        let verb = if waiting.len() == 1 { "is" } else { "are" };
        let reason = format!("{} {verb} back", names(&waiting));
        actions.push(Action::Say(format!("{reason}: all ranks start again from the snapshot")));
        self.halt_all(&reason, false, actions);
        self.phase = Phase::Halting { since: now, why: Why::Back { reason } };
    }

    fn gather(
        &mut self,
        (since, said): (Duration, Duration),
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        if self.stopping {
            self.finish(exit_code::REQUEUE, actions);
            return;
        }
        let (least, most) = self.policy.nodes;
        let first = self.history.is_empty();
        let wait = if first { self.policy.join_wait } else { self.policy.rejoin_wait };
        let waited = now.saturating_sub(since);
        let there = self.members.len();
        // Node 0 has what ranks go on from.
        let enough = there >= least && self.members.contains_key(&0);
        if there == most || (enough && waited >= wait) {
            self.start(actions);
        } else if waited >= wait.max(self.policy.join_wait) {
            actions.push(Action::Say(format!(
                "error: {there} of at least {least} nodes have come in {:.0} s, missing: {}\n\
                 hint: `--join_wait` waits longer; `--nnodes MIN:MAX` goes on with fewer",
                waited.as_secs_f64(),
                self.missing()
            )));
            self.finish(exit_code::REQUEUE, actions);
        } else if now.saturating_sub(said) >= (if said == since { SAY_FIRST } else { SAY }) {
            actions.push(Action::Say(format!(
                "waiting for {} ({there} of {most} nodes are there), {:.0} s",
                self.missing(),
                waited.as_secs_f64()
            )));
            self.phase = Phase::Gathering { since, said: now };
        }
    }

    /// Ranks are numbered by node; what is there is numbered without gaps.
    fn start(&mut self, actions: &mut Vec<Action>) {
        self.generation += 1;
        self.watch.begin();
        let processes = || self.members.values().map(|member| member.facts.processes);
        let world_size = processes().sum();
        // Every node has as many as the others.
        let full_world_size = processes().max().unwrap_or(0) * self.policy.nodes.1;
        if world_size < full_world_size {
            actions.push(Action::Say(format!(
                "going on with {world_size} of {full_world_size} ranks, without {}",
                self.missing()
            )));
        }
        let mut first_rank = 0;
        for (node, member) in &mut self.members {
            member.state = State::Running;
            let (node, generation) = (*node, self.generation);
            actions.push(Action::Start {
                node,
                generation,
                first_rank,
                world_size,
                full_world_size,
            });
            first_rank += member.facts.processes;
        }
        self.phase = Phase::Running { waiting_since: None };
    }

    fn halt(&mut self, since: Duration, why: Why, now: Duration, actions: &mut Vec<Action>) {
        let waited = now.saturating_sub(since);
        let still: Vec<usize> = self
            .members
            .iter()
            .filter(|(_, member)| member.state == State::Running)
            .map(|(node, _)| *node)
            .collect();
        // Without node 0 there is nothing to go on with: its ranks are waited for.
        if waited >= self.policy.halt_wait && !still.contains(&0) {
            for node in &still {
                self.members.remove(node);
                self.watch.forget(*node);
                let why = "it did not end its ranks";
                actions.push(Action::Say(format!("node {node} is left behind: {why}")));
                actions.push(Action::Leave { node: *node, why: why.to_owned() });
            }
        } else if !still.is_empty() {
            return;
        }
        match why {
            Why::Back { .. } if self.stopping => self.finish(exit_code::REQUEUE, actions),
            Why::Back { reason } => {
                self.note_restart(reason, None, now);
                self.gather_again(now, actions);
            }
            Why::Failed { node, host, failure, more } => {
                let used_up = self.used(&failure) >= self.policy.max_restarts;
                if let Some(code) = self.ended_at_once {
                    self.finish(code, actions);
                } else if is_final(failure.code) || used_up {
                    self.end_failed((node, &host), &failure, actions);
                } else if self.stopping {
                    // It would have started again: it may do so where it is started next.
                    self.finish(exit_code::REQUEUE, actions);
                } else if waited >= self.policy.merge {
                    self.try_again((node, &host), &failure, more, now, actions);
                }
            }
        }
    }

    /// How often ranks have started again after failures of this kind.
    fn used(&self, failure: &Failure) -> usize {
        self.restarts.get(&failure.cause).copied().unwrap_or(0)
    }

    /// A failure that ends the job.
    fn end_failed(&mut self, node: (usize, &str), failure: &Failure, actions: &mut Vec<Action>) {
        let used = self.used(failure);
        if used > 0 && !is_final(failure.code) {
            actions.push(Action::Say(format!(
                "error: {} {}, and the restarts for {} are used up: {used}",
                who(node, failure),
                failure.how,
                failure.cause
            )));
        }
        self.finish(failure.code, actions);
    }

    fn try_again(
        &mut self,
        node: (usize, &str),
        failure: &Failure,
        more: usize,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let used = self.restarts.entry(failure.cause.clone()).or_insert(0);
        *used += 1;
        let (used, max) = (*used, self.policy.max_restarts);
        let others = if more > 0 { format!(", and {more} more failures") } else { String::new() };
        let reason = format!("{} {}{others}", who(node, failure), failure.how);
        let from = match self.kept() {
            Some(moment) => format!("going on from step {} kept in memory", moment.step),
            None => "nothing is kept in memory yet, starting as the config says".to_owned(),
        };
        actions.push(Action::Say(format!(
            "starting again after {reason}: {used} of {max} restarts for {}, {from}",
            failure.cause
        )));
        self.note_restart(reason, Some(failure.cause.clone()), now);
        self.gather_again(now, actions);
    }

    fn note_restart(&mut self, reason: String, cause: Option<String>, now: Duration) {
        self.history.push(Restart {
            generation: self.generation,
            at_s: now.as_secs_f64(),
            reason,
            cause,
            from_step: self.kept().map(|moment| moment.step),
        });
    }

    fn gather_again(&mut self, now: Duration, actions: &mut Vec<Action>) {
        for member in self.members.values_mut() {
            member.state = State::Ready;
        }
        self.phase = Phase::Gathering { since: now, said: now };
        self.gather((now, now), now, actions);
    }

    fn finish(&mut self, code: i32, actions: &mut Vec<Action>) {
        self.phase = Phase::Over;
        actions.push(Action::Finish { code });
    }

    /// The nodes that are not there.
    fn missing(&self) -> String {
        let missing = (0..self.policy.nodes.1).filter(|node| !self.members.contains_key(node));
        names(&missing.collect::<Vec<_>>())
    }
}

/// `node 1` or `nodes 1, 3`.
fn names(nodes: &[usize]) -> String {
    let plural = if nodes.len() == 1 { "" } else { "s" };
    let nodes: Vec<String> = nodes.iter().map(|node| node.to_string()).collect();
    format!("node{plural} {}", nodes.join(", "))
}
