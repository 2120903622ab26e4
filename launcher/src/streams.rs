//! Which streams of which ranks are shown and which are logged: `--tee`, `--redirects`,
//! `--local_ranks_filter`, with torchrun's values.

use std::collections::BTreeMap;

use crate::launch::Launch;

/// Streams by rank: torchrun's numbers, 1 for stdout, 2 for stderr, 3 for both, 0 for none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Streams {
    /// The same for every rank of this machine.
    All(u8),
    /// By rank of this machine; none of the others.
    Some(BTreeMap<usize, u8>),
}

/// Ranks of one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalRanks(Vec<usize>);

/// Where one stream goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// To the launcher's own stream.
    pub shown: bool,
    /// To the rank's log file, where there is a folder.
    pub logged: bool,
}

/// Where the streams of one rank go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Routes {
    /// Of its stdout.
    pub stdout: Route,
    /// Of its stderr.
    pub stderr: Route,
}

const STDOUT: u8 = 1;
const STDERR: u8 = 2;

impl Streams {
    /// `3`, or `0:3,1:2`.
    pub fn parse(text: &str) -> Result<Streams, String> {
        let wrong = || {
            "0, 1 (stdout), 2 (stderr) or 3 (both) is needed, or such a number for each process as in \
             `0:3,1:2`"
                .to_owned()
        };
        let number = |text: &str| text.trim().parse::<u8>().ok().filter(|number| *number <= 3);
        if let Some(all) = number(text) {
            return Ok(Streams::All(all));
        }
        let mut some = BTreeMap::new();
        for part in text.split(',') {
            let (rank, value) = part.split_once(':').ok_or_else(wrong)?;
            let rank = rank.trim().parse().map_err(|_| wrong())?;
            if some.insert(rank, number(value).ok_or_else(wrong)?).is_some() {
                return Err(format!("a process is named twice: {rank}"));
            }
        }
        Ok(Streams::Some(some))
    }

    fn has(&self, local_rank: usize, stream: u8) -> bool {
        let streams = match self {
            Streams::All(streams) => *streams,
            Streams::Some(some) => some.get(&local_rank).copied().unwrap_or(0),
        };
        streams & stream != 0
    }
}

impl LocalRanks {
    /// Numbers separated by commas.
    pub fn parse(text: &str) -> Result<LocalRanks, String> {
        let numbers: Result<Vec<usize>, _> = text.split(',').map(|n| n.trim().parse()).collect();
        numbers.map(LocalRanks).map_err(|_| "numbers like `0,2` are needed".to_owned())
    }
}

impl Routes {
    /// Whether both streams are shown.
    pub fn show_all(self) -> bool {
        self.stdout.shown && self.stderr.shown
    }

    /// What the options say of a rank of this machine.
    pub fn of(launch: &Launch, local_rank: usize) -> Routes {
        let filter = launch.local_ranks_filter.as_ref();
        let is_shown = filter.is_none_or(|ranks| ranks.0.contains(&local_rank));
        let route = |stream| {
            let is_in =
                |list: &Option<Streams>| list.as_ref().is_some_and(|l| l.has(local_rank, stream));
            let (tee, redirect) = (is_in(&launch.tee), is_in(&launch.redirects));
            let nothing_said = launch.tee.is_none() && launch.redirects.is_none();
            Route { shown: is_shown && (tee || !redirect), logged: nothing_said || tee || redirect }
        };
        Routes { stdout: route(STDOUT), stderr: route(STDERR) }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn routes(options: &str, local_rank: usize) -> [(bool, bool); 2] {
        let words = ["lorarun"].into_iter().chain(options.split_whitespace());
        let cli = Cli::try_parse_from(words.chain(["check-ranks"])).unwrap();
        let Routes { stdout, stderr } = Routes::of(&cli.launch, local_rank);
        [(stdout.shown, stdout.logged), (stderr.shown, stderr.logged)]
    }

    #[test]
    fn values_are_torchruns() {
        for (text, streams) in [
            ("0", Streams::All(0)),
            ("3", Streams::All(3)),
            ("0:3", Streams::Some([(0, 3)].into())),
            ("0:1,2:2", Streams::Some([(0, 1), (2, 2)].into())),
        ] {
            assert_eq!(Streams::parse(text), Ok(streams), "{text}");
        }
        for text in ["", "4", "-1", "0:4", "a:1", "0:1,", "0:1,0:2", "0:1:2"] {
            assert!(Streams::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn streams_go_where_they_are_sent() {
        let both = (true, true);
        assert_eq!(routes("--log_dir l", 1), [both, both]);
        assert_eq!(routes("--log_dir l --tee 3", 1), [both, both]);
        assert_eq!(routes("--log_dir l -t 2", 0), [(true, false), both]);
        assert_eq!(routes("--log_dir l -r 3 -t 0:2", 0), [(false, true), both]);
        assert_eq!(routes("--log_dir l -r 3 -t 0:2", 1), [(false, true), (false, true)]);
        assert_eq!(routes("--local-ranks-filter 1", 0), [(false, true), (false, true)]);
        assert_eq!(routes("--local-ranks-filter 1", 1), [both, both]);
    }

    #[test]
    fn nothing_disappears_for_want_of_a_folder() {
        let hidden = Cli::try_parse_from(["lorarun", "-r", "3", "check-ranks"]).unwrap_err();
        assert!(hidden.to_string().contains("--log_dir"), "{hidden}");
    }
}
