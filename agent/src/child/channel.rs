//! What a new process of a container and the agent say to each other until its program runs.
//!
//! Each datagram is one letter and, for an error, its text. The program's start closes the process's end, which is how the agent
//! learns that it has started.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Context, Error};
use crate::sys::asynchronous;

/// What a process tells the agent.
#[derive(Debug)]
pub enum Report {
    /// It is in its user namespace, whose mappings are to be written now.
    NeedsMappings,
    /// What it has made for the agent: the controlling end of its terminal, or a root.
    Descriptor(OwnedFd),
    /// All is done but the start of the program.
    Ready,
    /// It ends because of this.
    Failed(Error),
    /// Its program has started, or it has been killed.
    Gone,
}

/// The longest text of an error that is passed on.
const MAX_TEXT: usize = 4096;

/// The process's end.
#[derive(Debug)]
pub struct Child(OwnedFd);

/// The agent's end.
#[derive(Debug)]
pub struct Parent(AsyncFd<OwnedFd>);

/// Makes a connected pair.
pub fn pair() -> Result<(Parent, Child), Error> {
    let what = || "making a channel to a new process".to_owned();
    let (parent, child) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .context(what)?;
    rustix::io::ioctl_fionbio(&parent, true).context(what)?;
    let parent = asynchronous(parent, Interest::READABLE).context(what)?;
    Ok((Parent(parent), Child(child)))
}

impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Child {
    /// Asks the agent to write the mappings of the user namespace, and waits until it has.
    pub fn ask_for_mappings(&self) -> Result<(), Error> {
        self.send(b"M", &[])?;
        self.wait()
    }

    /// Says that all is done, and waits for the order to start the program.
    pub fn ready(&self) -> Result<(), Error> {
        self.send(b"R", &[])?;
        self.wait()
    }

    /// Hands a descriptor over.
    pub fn hand_over(&self, descriptor: BorrowedFd<'_>) -> Result<(), Error> {
        self.send(b"D", &[descriptor])
    }

    /// Says why the process ends. If even that fails, its end says enough.
    pub fn failed(&self, error: &Error) {
        let mut message = format!("E{error}").into_bytes();
        message.truncate(MAX_TEXT);
        drop(self.send(&message, &[]));
    }

    fn send(&self, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            rights.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let message = [IoSlice::new(message)];
        rustix::net::sendmsg(&self.0, &message, &mut rights, SendFlags::NOSIGNAL)
            .context(|| "reporting to the agent".into())
            .map(drop)
    }

    fn wait(&self) -> Result<(), Error> {
        let what = || "waiting for the agent".to_owned();
        let mut order = [0];
        let (received, _) =
            rustix::net::recv(&self.0, &mut order, RecvFlags::empty()).context(what)?;
        if received == 1 {
            Ok(())
        } else {
            Err(Error::Failed("the agent has given up this process".into()))
        }
    }
}

impl Parent {
    /// The process's next report.
    pub async fn report(&self) -> Result<Report, Error> {
        let what = || "hearing from a new process".to_owned();
        let mut text = [0; MAX_TEXT];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let (length, descriptor) = self
            .0
            .async_io(Interest::READABLE, |socket| {
                let mut rights = RecvAncillaryBuffer::new(&mut space);
                let mut message = [IoSliceMut::new(&mut text)];
                let received = rustix::net::recvmsg(
                    socket,
                    &mut message,
                    &mut rights,
                    RecvFlags::CMSG_CLOEXEC,
                );
                let length = match received {
                    Err(Errno::CONNRESET) => 0,
                    received => received?.bytes,
                };
                let descriptor = rights.drain().find_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
                    _ => None,
                });
                Ok((length, descriptor))
            })
            .await
            .context(what)?;
        match (&text[..length], descriptor) {
            ([], _) => Ok(Report::Gone),
            ([b'M'], _) => Ok(Report::NeedsMappings),
            ([b'R'], _) => Ok(Report::Ready),
            ([b'D'], Some(descriptor)) => Ok(Report::Descriptor(descriptor)),
            ([b'E', text @ ..], _) => Ok(Report::Failed(Error::Failed(
                String::from_utf8_lossy(text).into_owned(),
            ))),
            _ => Err(Error::Failed(
                "a new process reports what has no meaning".into(),
            )),
        }
    }

    /// Lets the process go on: after its mappings are written, or to start its program.
    pub fn go_on(&self) -> Result<(), Error> {
        rustix::net::send(self.0.as_fd(), b"G", SendFlags::NOSIGNAL)
            .context(|| "telling a process to go on".into())
            .map(drop)
    }
}
