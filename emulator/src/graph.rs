//! Captures: which streams are in one, what was noted, and the graphs that came of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::cuda::driver::{Graph, Stream};
use engine::{EngineError, Result};

use crate::calls::Call;

/// A capture that is under way.
struct Capture {
    /// Streams other than the compute stream that were made to wait for it.
    joined: Vec<Stream>,
    calls: Vec<Call>,
    /// Why it cannot become a graph.
    broken: Option<String>,
}

/// Finished graphs, and the capture that is under way.
#[derive(Default)]
pub(crate) struct Graphs {
    graphs: BTreeMap<u64, Arc<[Call]>>,
    next: u64,
    capture: Option<Capture>,
}

impl Graphs {
    /// Whether work given to `stream` is noted now.
    pub(crate) fn captures(&self, stream: Stream) -> bool {
        self.capture
            .as_ref()
            .is_some_and(|c| stream == Stream::Compute || c.joined.contains(&stream))
    }

    /// Notes a piece of work; the capture must be under way.
    pub(crate) fn note(&mut self, call: Call) {
        if let Some(capture) = &mut self.capture {
            capture.calls.push(call);
        }
    }

    /// Fails if `stream` is being captured, and so does the capture's end: the host cannot wait
    /// for work that is not done.
    pub(crate) fn host_waits(&mut self, what: &str, stream: Stream) -> Result<()> {
        if !self.captures(stream) {
            return Ok(());
        }
        let why = format!("the host waits in `{what}`");
        if let Some(capture) = &mut self.capture {
            capture.broken.get_or_insert_with(|| why.clone());
        }
        Err(EngineError::NotCapturable(why))
    }

    /// Work of `before_this` waits for that of `after`.
    pub(crate) fn order(&mut self, after: Stream, before_this: Stream) {
        let (from, to) = (self.captures(after), self.captures(before_this));
        let Some(capture) = &mut self.capture else { return };
        match (from, to) {
            // Taken into the capture, or back to where it came from.
            (true, false) => capture.joined.push(before_this),
            (true, true) => {
                if before_this == Stream::Compute {
                    capture.joined.retain(|stream| *stream != after);
                }
            }
            (false, true) => {
                let why = format!("captured work waits for the stream {after:?} outside of it");
                capture.broken.get_or_insert(why);
            }
            (false, false) => {}
        }
    }

    /// Begins a capture.
    pub(crate) fn begin(&mut self) -> Result<()> {
        if self.capture.is_some() {
            return Err(EngineError::NotCapturable("a capture is under way".into()));
        }
        self.capture = Some(Capture { joined: Vec::new(), calls: Vec::new(), broken: None });
        Ok(())
    }

    /// Ends the capture.
    pub(crate) fn end(&mut self) -> Result<Graph> {
        let Some(capture) = self.capture.take() else {
            return Err(EngineError::NotCapturable("no capture is under way".into()));
        };
        if let Some(why) = capture.broken {
            return Err(EngineError::NotCapturable(why));
        }
        if let Some(stream) = capture.joined.first() {
            let why = format!("nothing waits for the captured stream: {stream:?}");
            return Err(EngineError::NotCapturable(why));
        }
        self.next += 1;
        self.graphs.insert(self.next, capture.calls.into());
        Ok(Graph(self.next))
    }

    /// The work of a graph, in order.
    pub(crate) fn calls(&self, graph: Graph) -> Result<Arc<[Call]>> {
        self.graphs.get(&graph.0).cloned().ok_or_else(|| EngineError::Card {
            what: "replay".into(),
            why: format!("there is no such graph: {}", graph.0),
        })
    }

    /// Forgets a graph.
    pub(crate) fn forget(&mut self, graph: Graph) {
        self.graphs.remove(&graph.0);
    }
}
