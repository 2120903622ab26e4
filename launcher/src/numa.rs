//! Which processor cores belong to which rank: those at the socket (NUMA node) of its card, so that
//! its threads and its memory are near. Ranks without a card are spread over the nodes.
//!
//! Everything is read from /sys and /proc; a machine that does not tell is left as it is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use collectives::env::visible_card_names;

/// The cores of a rank, and the node whose memory it prefers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// Number of the node.
    pub node: usize,
    /// Its cores that this process may use.
    pub cores: Vec<usize>,
}

/// Sockets of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Cores by node, those alone that this process may use.
    nodes: BTreeMap<usize, Vec<usize>>,
    /// Node by card, in the order of CUDA where that is known.
    cards: Vec<Option<usize>>,
}

impl Machine {
    /// This one.
    pub fn read() -> Machine {
        let allowed = allowed_cores();
        Machine::read_under(Path::new("/"), visible_card_names().as_deref(), &|core| {
            allowed.contains(&core)
        })
    }

    fn read_under(root: &Path, visible: Option<&str>, allows: &dyn Fn(usize) -> bool) -> Machine {
        let mut nodes = BTreeMap::new();
        for (name, path) in entries(&root.join("sys/devices/system/node")) {
            let Some(node) = name.strip_prefix("node").and_then(|n| n.parse::<usize>().ok()) else {
                continue;
            };
            let list = std::fs::read_to_string(path.join("cpulist")).unwrap_or_default();
            let cores: Vec<usize> =
                parse_list(&list).into_iter().filter(|core| allows(*core)).collect();
            // A node may hold memory alone.
            if !cores.is_empty() {
                nodes.insert(node, cores);
            }
        }
        // The driver's folder holds a folder for each card, named by its place on the bus; the
        // order of those is CUDA's for cards of one kind.
        let all: Vec<Card> = entries(&root.join("proc/driver/nvidia/gpus"))
            .into_iter()
            .map(|(place, path)| Card::read(root, &place, &path))
            .collect();
        let cards = match visible {
            None => all.iter().map(|card| card.node).collect(),
            Some(list) => list
                .split(',')
                .map(str::trim)
                .take_while(|id| !id.is_empty() && *id != "-1")
                .map(|id| find(&all, id).and_then(|card| card.node))
                .collect(),
        };
        Machine { nodes, cards }
    }

    /// Number of nodes with cores.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// The binding of each rank of this machine, given its card where it has one; none where there is
    /// nothing to choose.
    pub fn bind(&self, cards: &[Option<usize>]) -> Vec<Option<Binding>> {
        if self.nodes.len() < 2 {
            return vec![None; cards.len()];
        }
        let numbers: Vec<usize> = self.nodes.keys().copied().collect();
        let bind = |(rank, card): (usize, &Option<usize>)| {
            let near = card.and_then(|card| self.cards.get(card).copied().flatten());
            // Neighbours in rank share a node, as they do where cards decide.
            let node = near
                .filter(|node| self.nodes.contains_key(node))
                .unwrap_or(numbers[rank * numbers.len() / cards.len()]);
            Some(Binding { node, cores: self.nodes.get(&node)?.clone() })
        };
        cards.iter().enumerate().map(bind).collect()
    }
}

/// A card as the driver lists it.
struct Card {
    uuid: String,
    node: Option<usize>,
}

impl Card {
    fn read(root: &Path, place: &str, folder: &Path) -> Card {
        let facts = std::fs::read_to_string(folder.join("information")).unwrap_or_default();
        let uuid =
            facts.lines().find_map(|line| line.strip_prefix("GPU UUID:")).unwrap_or_default();
        let bus = root.join("sys/bus/pci/devices").join(place.to_lowercase()).join("numa_node");
        let node = std::fs::read_to_string(bus).ok();
        // The kernel says -1 where it does not know.
        let node = node.and_then(|text| text.trim().parse().ok());
        Card { uuid: uuid.trim().to_owned(), node }
    }
}

/// A card by its number or by the beginning of its UUID.
fn find<'c>(all: &'c [Card], id: &str) -> Option<&'c Card> {
    match id.parse::<usize>() {
        Ok(number) => all.get(number),
        Err(_) => all.iter().find(|card| card.uuid.starts_with(id)),
    }
}

/// Names and paths in a folder, by name; none if there is no such folder.
fn entries(folder: &Path) -> Vec<(String, PathBuf)> {
    let Ok(read) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut entries: Vec<_> = read
        .flatten()
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .collect();
    entries.sort();
    entries
}

/// `0-3,8,10-11`, as the kernel writes lists of cores.
fn parse_list(text: &str) -> Vec<usize> {
    let mut cores = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.trim().parse::<usize>(), last.trim().parse::<usize>())
        {
            cores.extend(first..=last);
        }
    }
    cores
}

/// Cores that this process may use.
fn allowed_cores() -> Vec<usize> {
    // SAFETY: a zeroed set is a valid place to write, of the size that is passed.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) != 0 {
            return Vec::new();
        }
        (0..libc::CPU_SETSIZE as usize).filter(|core| libc::CPU_ISSET(*core, &set)).collect()
    }
}

/// What the kernel is asked for, made before a child is forked: there nothing may be allocated.
#[derive(Clone, Copy)]
pub struct Call {
    set: libc::cpu_set_t,
    nodes: [u64; 16],
}

impl Binding {
    /// The call that binds a process and all that it starts.
    pub fn call(&self) -> Call {
        // SAFETY: a zeroed set is an empty one; numbers beyond its size are left out.
        let set = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            for core in self.cores.iter().filter(|core| **core < libc::CPU_SETSIZE as usize) {
                libc::CPU_SET(*core, &mut set);
            }
            set
        };
        let mut nodes = [0; 16];
        if let Some(word) = nodes.get_mut(self.node / 64) {
            *word = 1 << (self.node % 64);
        }
        Call { set, nodes }
    }
}

impl Call {
    /// Binds the calling thread, and with it what it starts. Async-signal-safe.
    ///
    /// # Errors
    /// The kernel's, for the cores; a container may forbid to prefer a node's memory, which then
    /// follows the cores anyway.
    pub fn make(&self) -> std::io::Result<()> {
        /// Memory of that node first, of others when it is full.
        const MPOL_PREFERRED: libc::c_int = 1;
        // SAFETY: both calls read from places that live as long as this borrow, of the sizes passed.
        unsafe {
            if libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const self.set) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            let bits = (self.nodes.len() * 64) as libc::c_ulong;
            libc::syscall(libc::SYS_set_mempolicy, MPOL_PREFERRED, self.nodes.as_ptr(), bits);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two sockets with four cores each, and four cards, the first two at the second socket.
    fn two_sockets() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("sys/devices/system/node/node0/cpulist", "0-1,4-5\n");
        write("sys/devices/system/node/node1/cpulist", "2-3,6-7\n");
        write("sys/devices/system/node/node2/cpulist", "\n");
        write("sys/devices/system/node/possible", "0-2\n");
        for (number, (place, node)) in [
            ("0000:1A:00.0", "1"),
            ("0000:3b:00.0", "1"),
            ("0000:86:00.0", "0"),
            ("0000:af:00.0", "-1"),
        ]
        .into_iter()
        .enumerate()
        {
            let uuid = format!("Model: \t A\nGPU UUID: \t GPU-{number}f2\n");
            write(&format!("proc/driver/nvidia/gpus/{place}/information"), &uuid);
            write(&format!("sys/bus/pci/devices/{}/numa_node", place.to_lowercase()), node);
        }
        root
    }

    fn nodes_of(machine: &Machine, cards: &[Option<usize>]) -> Vec<usize> {
        machine.bind(cards).into_iter().map(|binding| binding.unwrap().node).collect()
    }

    #[test]
    fn ranks_go_to_the_socket_of_their_card() {
        let root = two_sockets();
        let machine = Machine::read_under(root.path(), None, &|_| true);
        assert_eq!(machine.nodes(), 2);
        let all = [Some(0), Some(1), Some(2), Some(3)];
        // The kernel does not know where the last card is: as a rank without a card.
        assert_eq!(nodes_of(&machine, &all), [1, 1, 0, 1]);
        let second = machine.bind(&[Some(1)]).remove(0).unwrap();
        assert_eq!(second, Binding { node: 1, cores: vec![2, 3, 6, 7] });
        let visible = Machine::read_under(root.path(), Some("2,GPU-1f,9"), &|_| true);
        assert_eq!(nodes_of(&visible, &[Some(0), Some(1), Some(2)]), [0, 1, 1]);
    }

    #[test]
    fn ranks_without_cards_are_spread() {
        let root = two_sockets();
        let machine = Machine::read_under(root.path(), None, &|_| true);
        assert_eq!(nodes_of(&machine, &[None; 4]), [0, 0, 1, 1]);
        assert_eq!(nodes_of(&machine, &[None]), [0]);
        assert_eq!(nodes_of(&machine, &[None; 3]), [0, 0, 1]);
    }

    #[test]
    fn cores_that_are_not_allowed_are_left_out() {
        let root = two_sockets();
        let machine = Machine::read_under(root.path(), None, &|core| core != 6);
        let binding = machine.bind(&[Some(0)]).remove(0).unwrap();
        assert_eq!(binding.cores, [2, 3, 7]);
        let one = Machine::read_under(root.path(), None, &|core| [0, 1].contains(&core));
        assert_eq!((one.nodes(), one.bind(&[Some(0), None])), (1, vec![None, None]));
        let nothing = tempfile::tempdir().unwrap();
        assert_eq!(Machine::read_under(nothing.path(), None, &|_| true).nodes(), 0);
    }

    #[test]
    fn a_bound_thread_stays_on_its_cores() {
        let first = allowed_cores()[0];
        let binding = Binding { node: 0, cores: vec![first] };
        let bound = std::thread::spawn(move || {
            binding.call().make().unwrap();
            allowed_cores()
        });
        assert_eq!(bound.join().unwrap(), [first]);
    }

    #[test]
    fn lists_are_the_kernels() {
        assert_eq!(parse_list("0-2,5,7-8\n"), [0, 1, 2, 5, 7, 8]);
        assert_eq!(parse_list("\n"), Vec::<usize>::new());
        assert_eq!(parse_list("x,3-"), Vec::<usize>::new());
    }
}
