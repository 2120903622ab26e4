//! What nodes and coordinator say to each other, and how it travels: sealed frames over TCP.
//!
//! Every process of a job knows its token. The coordinator greets with a fresh number, the node
//! answers with its own; from both and the token each side makes the key of this conversation, and
//! every frame carries a tag over direction, number and content (HMAC-SHA256, RFC 2104). A frame that
//! was made without the token, overheard, repeated or reordered does not open. Nothing is hidden: the
//! frames hold addresses, numbers and words.

use std::io;
use std::time::Duration;

use collectives::Token;
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::event::{Facts, Failure, News};
use super::table::Table;

/// Longest frame: words and tables of a job.
const LONGEST: usize = 1 << 20;
/// How long a stranger may keep a connection without its first frame.
pub const GREETING: Duration = Duration::from_secs(5);
/// Told by both sides before anything else; another number is another program.
const HELLO: &[u8; 8] = b"lorajob1";

type Nonce = [u8; 16];

/// From a node to the coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Report {
    /// It is there and runs nothing. The clock is in milliseconds since 1970.
    Join { node: usize, job: String, facts: Facts, clock: u64 },
    /// It is still there.
    Beat(News),
    /// A rank of its failed.
    Failed { generation: u64, failure: Failure },
    /// All its ranks have ended: the code of all, and the failure that it comes from.
    Ended { generation: u64, code: i32, failure: Option<Failure> },
    /// Somebody asks that the job is saved and ends.
    StopAsked { why: String },
}

/// From the coordinator to a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Order {
    /// The node takes part. The number is the coordinator's own: another one is another job.
    Welcome { life: u64 },
    /// Start the ranks; rank 0 is met at this port of node 0.
    Start {
        generation: u64,
        first_rank: usize,
        world_size: usize,
        full_world_size: usize,
        meeting_port: u16,
    },
    /// End the ranks.
    Halt { generation: u64, reason: String, keep_flights: bool },
    /// Ask the ranks to save and end.
    Stop { generation: u64 },
    /// This node cannot take part.
    Refuse { why: String },
    /// This node is left behind: end the ranks, and join anew.
    Leave { why: String },
    /// The coordinator is still there; what it knows of all.
    Beat { table: Box<Table> },
    /// The job is over.
    Finish { code: i32 },
}

/// One direction of a conversation.
struct Seal {
    key: Vec<u8>,
    direction: u8,
    count: u64,
}

impl Seal {
    fn tag(&self, content: &[u8]) -> Hmac<Sha256> {
        // Keys of any length are taken.
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).unwrap_or_else(|_| unreachable!());
        mac.update(&[self.direction]);
        mac.update(&self.count.to_le_bytes());
        mac.update(content);
        mac
    }
}

/// The sending half.
pub struct Sender {
    stream: Box<dyn AsyncWrite + Send + Unpin>,
    seal: Seal,
}

/// The receiving half.
pub struct Receiver {
    stream: Box<dyn AsyncRead + Send + Unpin>,
    seal: Seal,
}

impl Sender {
    /// Sends one message.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        let content = serde_json::to_vec(message).map_err(io::Error::other)?;
        let tag = self.seal.tag(&content).finalize().into_bytes();
        self.seal.count += 1;
        let mut frame = (content.len() as u32).to_le_bytes().to_vec();
        frame.extend_from_slice(&content);
        frame.extend_from_slice(&tag);
        self.stream.write_all(&frame).await
    }

    /// Says that nothing more comes.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn close(&mut self) -> io::Result<()> {
        self.stream.shutdown().await
    }
}

impl Receiver {
    /// The next message. Not to be dropped half-way: a frame would be lost.
    ///
    /// # Errors
    /// Those of the connection, and [`io::ErrorKind::InvalidData`] for a frame that does not open.
    pub async fn receive<T: for<'de> Deserialize<'de>>(&mut self) -> io::Result<T> {
        let length = self.stream.read_u32_le().await? as usize;
        if length > LONGEST {
            return Err(unsealed());
        }
        let (mut content, mut tag) = (vec![0; length], [0; 32]);
        self.stream.read_exact(&mut content).await?;
        self.stream.read_exact(&mut tag).await?;
        self.seal.tag(&content).verify_slice(&tag).map_err(|_| unsealed())?;
        self.seal.count += 1;
        serde_json::from_slice(&content).map_err(|_| unsealed())
    }
}

fn unsealed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "another token, or no process of this job")
}

/// True for the error of a frame that does not open.
pub fn is_unsealed(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidData
}

/// Begins a conversation: both sides call it, one of them as the coordinator.
///
/// # Errors
/// Those of the connection, and [`io::ErrorKind::InvalidData`] for another program.
pub async fn converse(
    mut stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    token: &Token,
    as_coordinator: bool,
) -> io::Result<(Sender, Receiver)> {
    let own = nonce()?;
    stream.write_all(&[&HELLO[..], &own].concat()).await?;
    let (mut hello, mut theirs) = ([0; 8], Nonce::default());
    stream.read_exact(&mut hello).await?;
    stream.read_exact(&mut theirs).await?;
    if &hello != HELLO {
        return Err(unsealed());
    }
    let (coordinator, node) = if as_coordinator { (own, theirs) } else { (theirs, own) };
    let mut key =
        Hmac::<Sha256>::new_from_slice(token.text().as_bytes()).unwrap_or_else(|_| unreachable!());
    key.update(HELLO);
    key.update(&coordinator);
    key.update(&node);
    let key = key.finalize().into_bytes().to_vec();
    let seal = |by_coordinator: bool| Seal {
        key: key.clone(),
        direction: by_coordinator.into(),
        count: 0,
    };
    let (reader, writer) = tokio::io::split(stream);
    Ok((
        Sender { stream: Box::new(writer), seal: seal(as_coordinator) },
        Receiver { stream: Box::new(reader), seal: seal(!as_coordinator) },
    ))
}

/// A number that no other process has drawn.
///
/// # Errors
/// Those of the system.
pub fn draw_life() -> io::Result<u64> {
    let nonce = nonce()?;
    Ok(nonce.iter().fold(0, |number, byte| (number << 8) | u64::from(*byte)))
}

/// A fresh number from the kernel.
fn nonce() -> io::Result<Nonce> {
    use io::Read;
    let mut nonce = Nonce::default();
    std::fs::File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    Ok(nonce)
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    async fn pair(ours: &str, theirs: &str) -> ((Sender, Receiver), (Sender, Receiver)) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (ours, theirs) = (Token::new(ours), Token::new(theirs));
        let (near, far) = tokio::join!(
            async { converse(TcpStream::connect(address).await.unwrap(), &ours, false).await },
            async { converse(listener.accept().await.unwrap().0, &theirs, true).await },
        );
        (near.unwrap(), far.unwrap())
    }

    fn run(work: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work);
    }

    #[test]
    fn messages_travel_both_ways_in_order() {
        run(async {
            let ((mut sender, mut receiver), (mut back, mut far)) = pair("t", "t").await;
            for generation in 1..4 {
                let report = Report::Ended { generation, code: 0, failure: None };
                sender.send(&report).await.unwrap();
            }
            for generation in 1..4 {
                let report: Report = far.receive().await.unwrap();
                assert_eq!(report, Report::Ended { generation, code: 0, failure: None });
            }
            back.send(&Order::Finish { code: 75 }).await.unwrap();
            assert_eq!(receiver.receive::<Order>().await.unwrap(), Order::Finish { code: 75 });
        });
    }

    #[test]
    fn another_token_does_not_open_a_frame() {
        run(async {
            let ((mut sender, _), (_, mut far)) = pair("t", "u").await;
            sender.send(&Report::Beat(News::default())).await.unwrap();
            assert!(is_unsealed(&far.receive::<Report>().await.unwrap_err()));
        });
    }

    #[test]
    fn a_repeated_frame_does_not_open() {
        run(async {
            let ((mut sender, _), (_, mut far)) = pair("t", "t").await;
            sender.send(&Report::Beat(News::default())).await.unwrap();
            sender.seal.count = 0;
            sender.send(&Report::Beat(News::default())).await.unwrap();
            assert_eq!(far.receive::<Report>().await.unwrap(), Report::Beat(News::default()));
            assert!(is_unsealed(&far.receive::<Report>().await.unwrap_err()));
        });
    }

    #[test]
    fn another_program_is_noticed_at_once() {
        run(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let token = Token::new("t");
            let (result, ()) = tokio::join!(
                async { converse(listener.accept().await.unwrap().0, &token, true).await },
                async {
                    let mut stream = TcpStream::connect(address).await.unwrap();
                    stream.write_all(b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n").await.unwrap();
                },
            );
            assert!(is_unsealed(&result.map(drop).unwrap_err()));
        });
    }
}
