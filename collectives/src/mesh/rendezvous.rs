//! How ranks of several hosts find each other.
//!
//! Rank 0 listens at the address that every process of the job knows. Each rank opens a port of its
//! own, tells rank 0 who it is and where, and gets everyone's place once all have come. Then each
//! connects to its counterparts on the hosts before its own, and is connected to by the others. Every
//! message is sealed with the job's token, and names the start (generation) it belongs to.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Mesh;
use super::seal::{Ended, Patience, Token};
use crate::error::{CollectiveError, Result};

/// Between two looks at a listener, and between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(20);
/// What one stranger may take of a listener's time.
const STRANGER: Duration = Duration::from_secs(2);
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
    let streams = connect(seat, &own, &places, &patience).map_err(|ended| explain(ended, &fail))?;
    Mesh::new(seat.rank, seat.host(), streams).map_err(|error| fail(error.to_string()))
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
    let mut stream = reach(address, patience)?;
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
    patience: &Patience<'_>,
) -> std::result::Result<TcpStream, Ended> {
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
            return Err(Ended::Io(last));
        }
        std::thread::sleep(PAUSE);
    }
}

/// A rank that waits for the table.
struct Guest {
    join: Join,
    address: IpAddr,
    stream: TcpStream,
}

/// Waits for all ranks and tells each where the others are. Rank 0 itself listens at `port`.
fn receive_guests(
    seat: &Seat,
    port: u16,
    listener: &TcpListener,
    patience: &Patience<'_>,
) -> std::result::Result<Answer, Ended> {
    let (sender, arrivals) = channel();
    std::thread::scope(|scope| {
        let mut guests: Vec<Option<Guest>> = (1..seat.world_size).map(|_| None).collect();
        // Those that have no place: they are told why.
        let mut others = Vec::new();
        let mut refused = None;
        while refused.is_none() && guests.iter().any(Option::is_none) {
            if let Some((stream, address)) = accept(listener)? {
                // A stranger that says nothing must not keep the others waiting.
                let (sender, watch): (Sender<Guest>, _) = (sender.clone(), patience);
                scope.spawn(move || welcome(stream, address, seat, watch, &sender));
            }
            refused = take_arrivals(&arrivals, seat, &mut guests, &mut others);
            (patience.watch)().map_err(Ended::Stopped)?;
            if Instant::now() >= patience.until {
                return Err(Ended::Io(io::ErrorKind::TimedOut.into()));
            }
        }
        let places = guests.iter().flatten();
        let places = places.map(|guest| SocketAddr::new(guest.address, guest.join.port));
        let own = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
        let places = [own].into_iter().chain(places).collect();
        let answer = refused.map_or(Answer::Places(places), Answer::Refused);
        for guest in guests.iter_mut().flatten().chain(&mut others) {
            let bytes = to_bytes(&answer)?;
            let sent = patience.write_sealed(&mut guest.stream, &seat.token, TABLE, &bytes);
            // Who is gone will be missed in the first collective.
            drop(sent);
        }
        Ok(answer)
    })
}

/// Reads who has come; a stranger is let go.
fn welcome(
    mut stream: TcpStream,
    address: IpAddr,
    seat: &Seat,
    patience: &Patience<'_>,
    sender: &Sender<Guest>,
) {
    let until = patience.until.min(Instant::now() + STRANGER);
    let short = Patience { until, watch: patience.watch };
    let said = short.read_sealed(&mut stream, &seat.token, JOIN);
    if let Some(join) = said.ok().and_then(|said| from_bytes::<Join>(&said).ok()) {
        // The receiver may have what it waits for.
        drop(sender.send(Guest { join, address, stream }));
    }
}

/// Gives those that have come their places, that of rank 1 first; what contradicts is put into words.
fn take_arrivals(
    arrivals: &Receiver<Guest>,
    seat: &Seat,
    guests: &mut [Option<Guest>],
    others: &mut Vec<Guest>,
) -> Option<String> {
    let mut refused = None;
    while let Ok(guest) = arrivals.recv_timeout(PAUSE) {
        let Join { generation, rank, world_size, ranks_per_host, .. } = guest.join;
        // A rank of an earlier start that has not noticed its end yet.
        if generation != seat.generation {
            continue;
        }
        if (world_size, ranks_per_host) != (seat.world_size, seat.ranks_per_host) {
            refused = Some(format!(
                "rank {rank} at {} counts {world_size} ranks, {ranks_per_host} on a host; rank 0 \
                 counts {}, {} on a host",
                guest.address, seat.world_size, seat.ranks_per_host
            ));
        }
        let place = rank.checked_sub(1).and_then(|place| guests.get_mut(place));
        match place {
            Some(place @ None) => *place = Some(guest),
            Some(Some(earlier)) => {
                refused = Some(format!(
                    "two processes say that they are rank {rank}, at {} and {}",
                    earlier.address, guest.address
                ));
                others.push(guest);
            }
            None => {
                refused.get_or_insert(format!(
                    "rank 0 is here, and a process at {} says it is rank {rank}",
                    guest.address
                ));
                others.push(guest);
            }
        }
    }
    refused
}

/// A connection that has come, without waiting long for one.
fn accept(listener: &TcpListener) -> io::Result<Option<(TcpStream, IpAddr)>> {
    listener.set_nonblocking(true)?;
    match listener.accept() {
        Ok((stream, address)) => {
            stream.set_nonblocking(false)?;
            Ok(Some((stream, address.ip())))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        // The peer went before it was seen.
        Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
        Err(error) => Err(error),
    }
}

type Streams = Vec<Option<(usize, TcpStream)>>;

/// Connects to the counterparts on earlier hosts and is connected to by those on later ones.
fn connect(
    seat: &Seat,
    own: &TcpListener,
    places: &[SocketAddr],
    patience: &Patience<'_>,
) -> std::result::Result<Streams, Ended> {
    let mut streams: Streams = (0..seat.hosts()).map(|_| None).collect();
    let hello = Link { generation: seat.generation, rank: seat.rank };
    for (host, slot) in streams.iter_mut().enumerate().take(seat.host()) {
        let rank = seat.counterpart(host);
        let place = places.get(rank).copied().ok_or(Ended::Unsealed)?;
        let mut stream = reach(place, patience)?;
        patience.write_sealed(&mut stream, &seat.token, LINK, &to_bytes(&hello)?)?;
        *slot = Some((rank, stream));
    }
    while let Some(missing) = (seat.host() + 1..seat.hosts()).find(|host| streams[*host].is_none())
    {
        if let Some((mut stream, _)) = accept(own)? {
            let until = patience.until.min(Instant::now() + STRANGER);
            let short = Patience { until, watch: patience.watch };
            let said = short.read_sealed(&mut stream, &seat.token, LINK).ok();
            let said = said.and_then(|said| from_bytes::<Link>(&said).ok());
            let host = said.filter(|link| link.generation == seat.generation).and_then(|link| {
                (missing..seat.hosts()).find(|host| seat.counterpart(*host) == link.rank)
            });
            if let Some(host) = host {
                streams[host] = Some((seat.counterpart(host), stream));
            }
            continue;
        }
        (patience.watch)().map_err(Ended::Stopped)?;
        if Instant::now() >= patience.until {
            return Err(Ended::Io(io::ErrorKind::TimedOut.into()));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(streams)
}

fn to_bytes(value: &impl Serialize) -> std::result::Result<Vec<u8>, Ended> {
    serde_json::to_vec(value).map_err(|error| Ended::Io(io::Error::other(error)))
}

fn from_bytes<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> std::result::Result<T, Ended> {
    serde_json::from_slice(bytes).map_err(|_| Ended::Unsealed)
}
