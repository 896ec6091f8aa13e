//! Messages: a bounded queue, and a thread that writes them out.
//!
//! Service never waits for a log. A message finds the queue full, or the log
//! daemon away: it is counted, and the next one that gets through is followed by
//! the count.

mod sink;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::time::Duration;

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::config::LogChoice;
use sink::Sink;

/// Messages that may wait to be written.
const QUEUE: usize = 1024;
/// How long the end waits for the last messages.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Messages that found no room.
static LOST: AtomicU64 = AtomicU64::new(0);

enum Message {
    Line(Level, String),
    /// Says when all before it is written.
    Mark(SyncSender<()>),
}

/// The queue's end that the program holds.
struct Queue {
    sender: SyncSender<Message>,
    level: LevelFilter,
}

impl Log for Queue {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= self.level
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let message = Message::Line(record.level(), record.args().to_string());
        if let Err(TrySendError::Full(_)) = self.sender.try_send(message) {
            LOST.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

/// The running logger. Kept until the end, for the last words.
#[derive(Debug)]
pub struct Logging {
    sender: SyncSender<Message>,
}

/// Starts the thread and makes it the program's logger. `name` stands before
/// syslog messages.
pub fn start(choice: Option<LogChoice>, level: LevelFilter, name: &str) -> io::Result<Logging> {
    let choice = choice.unwrap_or_else(|| {
        if sink::stderr_is_journal() {
            LogChoice::Journal
        } else {
            LogChoice::Stderr
        }
    });
    let (sender, receiver) = mpsc::sync_channel(QUEUE);
    let sink = Sink::new(choice, name);
    std::thread::Builder::new()
        .name("log".into())
        .spawn(move || write(&receiver, sink))?;
    let queue = Queue {
        sender: sender.clone(),
        level,
    };
    log::set_boxed_logger(Box::new(queue)).map_err(io::Error::other)?;
    log::set_max_level(level);
    Ok(Logging { sender })
}

/// One message, one line: who can put a line end into a message could make up
/// others.
pub fn one_line(text: &str) -> String {
    text.replace(|c: char| c.is_control(), " ")
}

/// The thread's life.
fn write(messages: &Receiver<Message>, mut sink: Sink) {
    let mut unsaid = 0;
    for message in messages {
        match message {
            Message::Line(level, text) => {
                let text = one_line(&text);
                unsaid += LOST.swap(0, Ordering::Relaxed) + u64::from(!sink.write(level, &text));
                if unsaid > 0 && sink.write(Level::Warn, &format!("{unsaid} messages lost")) {
                    unsaid = 0;
                }
            }
            Message::Mark(done) => {
                // Who waits may have given up.
                let _ = done.try_send(());
            }
        }
    }
}

impl Logging {
    /// Waits until all is written, but not for ever.
    pub fn finish(&self) {
        let (done, wait) = mpsc::sync_channel(1);
        if self.sender.try_send(Message::Mark(done)).is_ok() {
            // A log that hangs does not keep the process.
            let _ = wait.recv_timeout(LAST_WORDS);
        }
    }
}
