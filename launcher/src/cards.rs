//! How many ranks there are, and which card each uses.
//!
//! Ranks see the cards that `CUDA_VISIBLE_DEVICES` of the launcher shows, unchanged: the numbers of
//! `--gpu_ids` count those, as they do for `accelerate launch`. A rank learns its own by
//! `LORARUN_CARD`; without `--gpu_ids` it is the rank's number on this host.

use collectives::env::visible_cards;

use crate::numa::Binding;

/// What `--gpu_ids` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cards {
    /// Every card.
    All,
    /// These, in the order of the ranks.
    List(Vec<usize>),
}

impl Cards {
    /// `all`, or numbers separated by commas.
    pub fn parse(text: &str) -> Result<Cards, String> {
        if text.trim() == "all" {
            return Ok(Cards::All);
        }
        let numbers: Result<Vec<usize>, _> =
            text.split(',').map(|number| number.trim().parse()).collect();
        numbers.map(Cards::List).map_err(|_| "numbers like 0,2,3 or `all` are needed".to_owned())
    }
}

/// What `--nproc_per_node` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PerNode {
    /// So many.
    Count(usize),
    /// One for each card.
    Gpu,
    /// One for each card where cards can be used.
    Auto,
    /// One, on the processor.
    Cpu,
}

impl PerNode {
    /// torchrun's words, or a number.
    pub fn parse(text: &str) -> Result<PerNode, String> {
        match text {
            "gpu" => Ok(PerNode::Gpu),
            "auto" => Ok(PerNode::Auto),
            "cpu" => Ok(PerNode::Cpu),
            _ => match text.parse() {
                Ok(0) => Err("at least 1 is needed".to_owned()),
                Ok(count) => Ok(PerNode::Count(count)),
                Err(_) => Err("a whole number from 1, `gpu`, `cpu` or `auto` is needed".to_owned()),
            },
        }
    }
}

/// Refuses more ranks than cards, and cards that are not there; `cards` is their number. For ranks
/// that must have a card each.
pub fn check(ranks: &Ranks, cards: usize) -> Result<(), String> {
    if let Some(missing) = ranks.cards.iter().find(|card| **card >= cards) {
        return Err(format!(
            "`--gpu_ids` names a card that this machine does not show: {missing}\n\
             hint: cards are counted from 0, and it shows: {cards}"
        ));
    }
    if ranks.cards.is_empty() && ranks.count > cards {
        return Err(format!(
            "{} processes on this machine need a card each, and it shows: {cards}\n\
             hint: `--num_processes {cards}`, or share a card by naming it twice: `--gpu_ids 0,0`; \
             `--cpu` trains on the processor",
            ranks.count
        ));
    }
    Ok(())
}

/// The ranks of a run and their cards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranks {
    count: usize,
    /// By rank; none were named if empty.
    cards: Vec<usize>,
    /// NCCL may sum between ranks that share a card.
    nccl_on_shared_card: bool,
    /// By rank; none are bound if empty.
    bindings: Vec<Option<Binding>>,
}

impl Ranks {
    /// The ranks that `--num_processes` and `--gpu_ids` ask for.
    pub fn new(processes: Option<usize>, cards: Option<&Cards>) -> Result<Ranks, String> {
        match (processes, cards) {
            (count, None) => Ok(Ranks::without_cards(count.unwrap_or(1))),
            (Some(count), Some(Cards::All)) => Ok(Ranks::without_cards(count)),
            (None, Some(Cards::All)) => match visible_cards() {
                Some(count @ 1..) => Ok(Ranks::without_cards(count)),
                Some(0) => Err("`--gpu_ids all` finds no card".to_owned()),
                None => Err("`--gpu_ids all` cannot count the cards of this machine\n\
                             hint: add `--num_processes N`, or name them: `--gpu_ids 0,1`"
                    .to_owned()),
            },
            (count, Some(Cards::List(ids))) => {
                let count = count.unwrap_or(ids.len());
                if count > ids.len() {
                    return Err(format!(
                        "`--gpu_ids` names fewer cards than `--num_processes` {count} needs: {}\n\
                         hint: to share cards, name them twice",
                        join(ids)
                    ));
                }
                Ok(Ranks { cards: ids[..count].to_vec(), ..Ranks::without_cards(count) })
            }
        }
    }

    fn without_cards(count: usize) -> Ranks {
        Ranks { count, cards: Vec::new(), nccl_on_shared_card: false, bindings: Vec::new() }
    }

    /// The same ranks, which NCCL may join even where they share a card.
    pub fn with_nccl_on_shared_card(self, nccl_on_shared_card: bool) -> Ranks {
        Ranks { nccl_on_shared_card, ..self }
    }

    /// The same ranks, kept at these cores.
    pub fn with_bindings(self, bindings: Vec<Option<Binding>>) -> Ranks {
        Ranks { bindings, ..self }
    }

    /// The cores that a rank is kept at.
    pub fn binding(&self, rank: usize) -> Option<&Binding> {
        self.bindings.get(rank)?.as_ref()
    }

    /// Number of ranks.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The card of a rank, where one was named.
    pub fn card(&self, rank: usize) -> Option<usize> {
        self.cards.get(rank).copied()
    }

    /// Whether NCCL shall take a rank for a host of its own, since it refuses two ranks of one host on
    /// one card.
    pub fn poses_as_host(&self, rank: usize) -> bool {
        let own = self.card(rank);
        self.nccl_on_shared_card
            && own.is_some()
            && self.cards.iter().filter(|card| Some(**card) == own).count() > 1
    }
}

fn join(ids: &[usize]) -> String {
    ids.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(processes: Option<usize>, cards: &str) -> Result<Ranks, String> {
        Ranks::new(processes, Some(&Cards::parse(cards)?))
    }

    #[test]
    fn one_process_per_named_card() {
        let three = ranks(None, "0,2, 3").unwrap();
        assert_eq!((three.count(), three.card(1), three.card(3)), (3, Some(2), None));
        assert!(!three.with_nccl_on_shared_card(true).poses_as_host(1));
        assert_eq!(
            ranks(Some(2), "5,6,7").unwrap(),
            Ranks { cards: vec![5, 6], ..Ranks::without_cards(2) }
        );
        assert_eq!(Ranks::new(None, None).unwrap(), Ranks::without_cards(1));
    }

    #[test]
    fn sharing_a_card_is_said_by_naming_it_twice() {
        let error = ranks(Some(2), "1").unwrap_err();
        assert!(error.contains("names fewer cards than `--num_processes` 2 needs: 1"), "{error}");
        let shared = ranks(None, "1,0,1").unwrap();
        assert!(!shared.poses_as_host(0));
        let shared = shared.with_nccl_on_shared_card(true);
        assert_eq!([0, 1, 2].map(|rank| shared.poses_as_host(rank)), [true, false, true]);
    }

    #[test]
    fn more_processes_than_cards_are_refused_with_both_numbers() {
        let three = Ranks::new(Some(3), None).unwrap();
        assert_eq!(check(&three, 3), Ok(()));
        let error = check(&three, 2).unwrap_err();
        assert!(
            error.starts_with("3 processes on this machine need a card each, and it shows: 2\n")
        );
        let named = ranks(None, "0,2,0").unwrap();
        assert_eq!(check(&named, 3), Ok(()));
        let error = check(&named, 2).unwrap_err();
        assert!(error.starts_with("`--gpu_ids` names a card that this machine does not show: 2\n"));
    }

    #[test]
    fn processes_of_a_node_in_torchruns_words() {
        for (text, meant) in [
            ("3", PerNode::Count(3)),
            ("gpu", PerNode::Gpu),
            ("auto", PerNode::Auto),
            ("cpu", PerNode::Cpu),
        ] {
            assert_eq!(PerNode::parse(text), Ok(meant));
        }
        for text in ["0", "", "tpu", "-1"] {
            assert!(PerNode::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn all_cards_leave_the_choice_to_the_rank() {
        assert_eq!(ranks(Some(4), "all").unwrap(), Ranks::without_cards(4));
    }

    #[test]
    fn what_is_no_card_is_refused() {
        for text in ["", "0,", "a", "-1", "0 1"] {
            assert!(Cards::parse(text).is_err(), "{text}");
        }
    }
}
