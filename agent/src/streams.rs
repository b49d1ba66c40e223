//! Matches the streams that the host opens with the requests that name them, whichever comes first.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::AsyncReadExt;
use tokio::sync::oneshot;

use crate::error::Error;
use crate::socket::Socket;

/// The most streams that may wait for their number to arrive or for a request that names them.
const MAX_UNMATCHED: usize = 256;

/// The streams of one sandbox.
#[derive(Debug, Default)]
pub struct Streams {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// Streams whose number has not arrived yet.
    nameless: usize,
    arrived: HashMap<u64, Socket>,
    wanted: HashMap<u64, oneshot::Sender<Socket>>,
}

/// Reads a stream's name as requests write it; none for the empty name, which means `/dev/null`.
pub fn parse_name(field: &str, name: &str) -> Result<Option<u64>, Error> {
    if name.is_empty() {
        return Ok(None);
    }
    name.parse().map(Some).map_err(|_| {
        Error::InvalidArgument(format!(
            "{field} is {name:?}: expected a stream's number, or nothing"
        ))
    })
}

impl Streams {
    /// Takes a stream that the host has opened, reads its number, and hands it to whoever wants it or keeps it until then. A
    /// stream that comes when too many are waiting, or with a number that another has, is closed.
    pub async fn offer(self: Arc<Self>, mut stream: Socket) {
        {
            let mut table = self.table();
            if table.nameless + table.arrived.len() >= MAX_UNMATCHED {
                return;
            }
            table.nameless += 1;
        }
        let number = stream.read_u64_le().await;
        let mut table = self.table();
        table.nameless -= 1;
        let Ok(number) = number else { return };
        match table.wanted.remove(&number) {
            // A request that no longer waits drops the stream, which closes it.
            Some(request) => drop(request.send(stream)),
            None => {
                table.arrived.entry(number).or_insert(stream);
            }
        }
    }

    /// Waits for the stream with this number; none if [`Streams::forget`] ended the wait.
    pub async fn take(&self, number: u64) -> Option<Socket> {
        let wait = {
            let mut table = self.table();
            if let Some(stream) = table.arrived.remove(&number) {
                return Some(stream);
            }
            let (sender, receiver) = oneshot::channel();
            table.wanted.insert(number, sender);
            receiver
        };
        wait.await.ok()
    }

    /// Ends the wait for a stream, and closes it if it is there but was not taken.
    pub fn forget(&self, number: u64) {
        let mut table = self.table();
        table.wanted.remove(&number);
        table.arrived.remove(&number);
    }

    /// Closes a stream that nobody will take, now or when it comes.
    pub fn refuse(&self, number: u64) {
        let mut table = self.table();
        if table.arrived.remove(&number).is_none() {
            let (nobody, _) = oneshot::channel();
            table.wanted.insert(number, nobody);
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, Socket) {
        let (host, guest) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        (host, Socket::new(guest.into()).unwrap())
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_stream_is_matched_whichever_comes_first() {
        let streams = Arc::new(Streams::default());
        let (mut host, guest) = pair();
        host.write_all(&7u64.to_le_bytes()).unwrap();
        streams.clone().offer(guest).await;
        assert!(streams.take(7).await.is_some());

        let (mut host, guest) = pair();
        let (taken, ()) = tokio::join!(streams.take(8), async {
            host.write_all(&8u64.to_le_bytes()).unwrap();
            streams.clone().offer(guest).await;
        });
        assert!(taken.is_some());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_forgotten_stream_is_closed_and_its_waiter_released() {
        let streams = Arc::new(Streams::default());
        let (taken, ()) = tokio::join!(streams.take(1), async { streams.forget(1) });
        assert!(taken.is_none());

        let (mut host, guest) = pair();
        host.write_all(&2u64.to_le_bytes()).unwrap();
        streams.clone().offer(guest).await;
        streams.forget(2);
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn silent_streams_are_bounded_and_do_not_block_others() {
        let streams = Arc::new(Streams::default());
        let mut silent = Vec::new();
        for _ in 0..MAX_UNMATCHED - 1 {
            let (host, guest) = pair();
            tokio::spawn(streams.clone().offer(guest));
            silent.push(host);
        }
        while streams.table().nameless < MAX_UNMATCHED - 1 {
            tokio::task::yield_now().await;
        }
        let (mut host, guest) = pair();
        host.write_all(&3u64.to_le_bytes()).unwrap();
        streams.clone().offer(guest).await;
        // The table is full now: one more is closed at once.
        let (mut late, guest) = pair();
        streams.clone().offer(guest).await;
        assert_eq!(late.read(&mut [0]).unwrap(), 0);
        assert!(streams.take(3).await.is_some());
    }

    #[test]
    fn names_are_numbers_or_nothing() {
        assert_eq!(parse_name("stdin", ""), Ok(None));
        assert_eq!(
            parse_name("stdin", "18446744073709551615"),
            Ok(Some(u64::MAX))
        );
        assert!(parse_name("stdin", "/run/fifo").is_err());
        assert!(parse_name("stdin", "-1").is_err());
    }
}
