//! How ranks of several hosts find each other.
//!
//! Rank 0 listens at the address that every process of the job knows. Each rank opens a port of its
//! own, tells rank 0 who it is and where, and gets everyone's place once all have come. Then each
//! connects to its counterparts on the hosts before its own, and is connected to by the others. Every
//! message is sealed with the job's token, and names the start (generation) it belongs to.

use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::door::{Door, Visitor};
use super::seal::{Ended, Patience, Token};
use super::{Mesh, Way};
use crate::error::{CollectiveError, Result};

/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(20);
/// Between two lines that say what is being waited for.
const TELL: Duration = Duration::from_secs(10);
/// What one attempt to connect may take.
const ATTEMPT: Duration = Duration::from_secs(2);

const JOIN: &str = "join";
const TABLE: &str = "table";
const LINK: &str = "link";

/// Who a rank is among the ranks of all hosts.
#[derive(Clone, Debug)]
pub(crate) struct Seat {
    pub rank: usize,
    pub world_size: usize,
    /// Ranks on each host; rank r is on host r / ranks_per_host.
    pub ranks_per_host: usize,
    pub generation: u64,
    pub token: Token,
}

impl Seat {
    fn host(&self) -> usize {
        self.rank / self.ranks_per_host
    }

    fn hosts(&self) -> usize {
        self.world_size / self.ranks_per_host
    }

    /// The rank of this one's number on another host.
    fn counterpart(&self, host: usize) -> usize {
        host * self.ranks_per_host + self.rank % self.ranks_per_host
    }
}

/// Where rank 0 is found.
pub(crate) struct Meeting<'m> {
    /// `host:port`.
    pub address: (&'m str, u16),
    /// The listener at that address, where rank 0 was handed one; it opens its own otherwise.
    pub listener: Option<TcpListener>,
    pub deadline: Duration,
    pub watch: &'m (dyn Fn() -> Result<()> + Sync),
}

/// What a rank says of itself.
#[derive(Debug, Serialize, Deserialize)]
struct Join {
    generation: u64,
    rank: usize,
    world_size: usize,
    ranks_per_host: usize,
    port: u16,
}

/// What rank 0 answers.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// Where each rank listens.
    Places(Vec<SocketAddr>),
    Refused(String),
}

/// What a rank says to a counterpart that it connects to.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Link {
    generation: u64,
    rank: usize,
    /// Whether this is the quiet line beside the connection (`side.rs`).
    side: bool,
}

/// Meets the ranks of all hosts and connects this one to its counterparts.
///
/// # Errors
/// An address that cannot be reached or used, ranks that contradict each other, another token, the
/// deadline, a stop on this host.
pub(crate) fn meet(seat: &Seat, mut meeting: Meeting<'_>) -> Result<Mesh> {
    let until = Instant::now() + meeting.deadline;
    let patience = Patience { until, watch: meeting.watch };
    let fail = |why: String| CollectiveError::Meeting {
        address: format!("{}:{}", meeting.address.0, meeting.address.1),
        why,
    };
    let own = TcpListener::bind(("0.0.0.0", 0)).map_err(|e| fail(e.to_string()))?;
    let answer = if seat.rank == 0 {
        let listener = match meeting.listener.take() {
            Some(listener) => listener,
            None => TcpListener::bind(("0.0.0.0", meeting.address.1))
                .map_err(|e| fail(format!("cannot listen there: {e}")))?,
        };
        let port = own.local_addr().map_err(|e| fail(e.to_string()))?.port();
        receive_guests(seat, port, &listener, &patience)
    } else {
        ask(seat, &own, meeting.address, &patience)
    };
    let places = match answer.map_err(|ended| explain(ended, &fail))? {
        Answer::Places(places) => places,
        Answer::Refused(why) => return Err(fail(why)),
    };
    let ways = connect(seat, &own, &places, &patience).map_err(|ended| explain(ended, &fail))?;
    Mesh::new(seat.rank, seat.host(), ways).map_err(|error| fail(error.to_string()))
}

fn explain(ended: Ended, fail: &dyn Fn(String) -> CollectiveError) -> CollectiveError {
    match ended {
        Ended::Stopped(error) => error,
        Ended::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
            fail("time ran out before all had come".to_owned())
        }
        Ended::Io(error) if is_hang_up(error.kind()) => {
            fail("it ended the connection: another token, or no rank of this job".to_owned())
        }
        Ended::Io(error) => fail(error.to_string()),
        Ended::Unreached(why) => fail(why),
        Ended::Unsealed => fail("a rank has another token".to_owned()),
    }
}

/// The other side closed the connection.
fn is_hang_up(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(kind, BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// Tells rank 0 where this rank listens; waits for the places of all.
fn ask(
    seat: &Seat,
    own: &TcpListener,
    address: (&str, u16),
    patience: &Patience<'_>,
) -> std::result::Result<Answer, Ended> {
    let name = format!("rank 0 at {}:{}", address.0, address.1);
    let mut stream = reach(address, &name, patience)?;
    let join = Join {
        generation: seat.generation,
        rank: seat.rank,
        world_size: seat.world_size,
        ranks_per_host: seat.ranks_per_host,
        port: own.local_addr()?.port(),
    };
    patience.write_sealed(&mut stream, &seat.token, JOIN, &to_bytes(&join)?)?;
    let mut answer = from_bytes(&patience.read_sealed(&mut stream, &seat.token, TABLE)?)?;
    if let Answer::Places(places) = &mut answer {
        // Rank 0 does not know under which address it is reached; this rank has just reached it.
        let reached = stream.peer_addr()?.ip();
        places
            .iter_mut()
            .filter(|place| place.ip().is_unspecified())
            .for_each(|p| p.set_ip(reached));
    }
    Ok(answer)
}

/// Tries until it succeeds: rank 0 may start later than the others.
fn reach(
    address: impl ToSocketAddrs + Copy,
    name: &str,
    patience: &Patience<'_>,
) -> std::result::Result<TcpStream, Ended> {
    let mut waiting = Waiting::begin();
    loop {
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        match address.to_socket_addrs() {
            Err(error) => last = error,
            Ok(addresses) => {
                for address in addresses {
                    match TcpStream::connect_timeout(&address, ATTEMPT) {
                        Ok(stream) => return Ok(stream),
                        Err(error) => last = error,
                    }
                }
            }
        }
        (patience.watch)().map_err(Ended::Stopped)?;
        if Instant::now() >= patience.until {
            return Err(Ended::Unreached(format!("{name}: {last}")));
        }
        waiting.tell(|| format!("for {name}, last answer: {last}"));
        std::thread::sleep(PAUSE);
    }
}

/// Tells now and then what is being waited for.
struct Waiting {
    since: Instant,
    told: Instant,
}

impl Waiting {
    fn begin() -> Waiting {
        Waiting { since: Instant::now(), told: Instant::now() }
    }

    fn tell(&mut self, what: impl Fn() -> String) {
        if self.told.elapsed() >= TELL {
            self.told = Instant::now();
            let seconds = self.since.elapsed().as_secs();
            // A reader of stderr that went away leaves nobody to tell.
            drop(writeln!(io::stderr().lock(), "waiting {} so far: {seconds} s", what()));
        }
    }
}

/// Those that have come to rank 0.
struct Guests {
    /// That of rank 1 first.
    places: Vec<Option<Visitor<Join>>>,
    /// Those that have no place: they are told why.
    others: Vec<Visitor<Join>>,
}

/// Waits for all ranks and tells each where the others are. Rank 0 itself listens at `port`.
fn receive_guests(
    seat: &Seat,
    port: u16,
    listener: &TcpListener,
    patience: &Patience<'_>,
) -> std::result::Result<Answer, Ended> {
    let none = (1..seat.world_size).map(|_| None).collect();
    let mut guests = Guests { places: none, others: Vec::new() };
    let mut refused = None;
    let door = Door { listener, token: &seat.token, purpose: JOIN, patience };
    let come = door.receive(|guest| {
        refused = guests.take(guest, seat, patience);
        refused.is_some() || guests.places.iter().all(Option::is_some)
    });
    if let Err(Ended::Io(error)) = &come
        && error.kind() == io::ErrorKind::TimedOut
    {
        return Err(Ended::Unreached(guests.describe_missing()));
    }
    come?;
    let places = guests.places.iter().flatten();
    let places = places.map(|guest| SocketAddr::new(guest.address, guest.said.port));
    let own = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
    let places = [own].into_iter().chain(places).collect();
    let answer = refused.map_or(Answer::Places(places), Answer::Refused);
    let bytes = to_bytes(&answer)?;
    std::thread::scope(|scope| {
        for guest in guests.places.iter_mut().flatten().chain(&mut guests.others) {
            // Each on its own thread: one that hangs must not keep the others waiting. Who is gone
            // will be missed in the first collective.
            scope.spawn(|| patience.write_sealed(&mut guest.stream, &seat.token, TABLE, &bytes));
        }
    });
    Ok(answer)
}

impl Guests {
    /// Gives who has come a place; what contradicts is put into words.
    fn take(
        &mut self,
        mut guest: Visitor<Join>,
        seat: &Seat,
        patience: &Patience<'_>,
    ) -> Option<String> {
        let Join { generation, rank, world_size, ranks_per_host, .. } = guest.said;
        if generation != seat.generation {
            // A rank of an earlier start that has not noticed its end yet; the others go on.
            let why = format!(
                "rank {rank} belongs to start {generation} of this job, and this is start {}",
                seat.generation
            );
            let until = patience.until.min(Instant::now() + ATTEMPT);
            let short = Patience { until, watch: patience.watch };
            if let Ok(bytes) = to_bytes(&Answer::Refused(why)) {
                // It may be gone.
                drop(short.write_sealed(&mut guest.stream, &seat.token, TABLE, &bytes));
            }
            return None;
        }
        let mut refused = None;
        if (world_size, ranks_per_host) != (seat.world_size, seat.ranks_per_host) {
            refused = Some(format!(
                "rank {rank} at {} counts {world_size} ranks, {ranks_per_host} on a host; rank 0 \
                 counts {}, {} on a host",
                guest.address, seat.world_size, seat.ranks_per_host
            ));
        }
        match rank.checked_sub(1).and_then(|place| self.places.get_mut(place)) {
            Some(place @ None) => *place = Some(guest),
            Some(Some(earlier)) => {
                refused = Some(format!(
                    "two processes say that they are rank {rank}, at {} and {}",
                    earlier.address, guest.address
                ));
                self.others.push(guest);
            }
            None => {
                refused.get_or_insert(format!(
                    "rank 0 is here, and a process at {} says it is rank {rank}",
                    guest.address
                ));
                self.others.push(guest);
            }
        }
        refused
    }

    fn describe_missing(&self) -> String {
        let missing = self.places.iter().enumerate().filter(|(_, place)| place.is_none());
        let missing: Vec<String> = missing.map(|(place, _)| (place + 1).to_string()).collect();
        format!("time ran out before all had come, missing ranks: {}", missing.join(", "))
    }
}

type Ways = Vec<Option<Way>>;

/// Connects to the counterparts on earlier hosts and is connected to by those on later ones.
fn connect(
    seat: &Seat,
    own: &TcpListener,
    places: &[SocketAddr],
    patience: &Patience<'_>,
) -> std::result::Result<Ways, Ended> {
    let mut ways: Ways = (0..seat.hosts()).map(|_| None).collect();
    for (host, slot) in ways.iter_mut().enumerate().take(seat.host()) {
        let rank = seat.counterpart(host);
        let place = places.get(rank).copied().ok_or(Ended::Unsealed)?;
        let line = |side| {
            let mut stream = reach(place, &format!("rank {rank} at {place}"), patience)?;
            let hello = Link { generation: seat.generation, rank: seat.rank, side };
            patience.write_sealed(&mut stream, &seat.token, LINK, &to_bytes(&hello)?)?;
            Ok::<_, Ended>(stream)
        };
        *slot = Some(Way { rank, data: line(false)?, side: line(true)? });
    }
    let mut lines: Vec<[Option<TcpStream>; 2]> = (0..seat.hosts()).map(|_| [None, None]).collect();
    let later = seat.host() + 1..seat.hosts();
    let door = Door { listener: own, token: &seat.token, purpose: LINK, patience };
    if !later.is_empty() {
        door.receive(|visitor: Visitor<Link>| {
            let Link { generation, rank, side } = visitor.said;
            let host = later.clone().find(|host| seat.counterpart(*host) == rank);
            if let Some(host) = host.filter(|_| generation == seat.generation) {
                lines[host][usize::from(side)] = Some(visitor.stream);
            }
            later.clone().all(|host| lines[host].iter().all(Option::is_some))
        })?;
    }
    for (host, lines) in lines.into_iter().enumerate() {
        if let [Some(data), Some(side)] = lines {
            ways[host] = Some(Way { rank: seat.counterpart(host), data, side });
        }
    }
    Ok(ways)
}

fn to_bytes(value: &impl Serialize) -> std::result::Result<Vec<u8>, Ended> {
    serde_json::to_vec(value).map_err(|error| Ended::Io(io::Error::other(error)))
}

fn from_bytes<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> std::result::Result<T, Ended> {
    serde_json::from_slice(bytes).map_err(|_| Ended::Unsealed)
}
