//! Where a command's answer goes: usually a pipe, whose reader may leave before the end.

use std::io::{self, BufWriter, ErrorKind, Write};

use anyhow::{Context as _, Result};

/// What is written after the reader has gone is thrown away, which is no failure.
pub struct Pipe<W: Write> {
    out: BufWriter<W>,
    is_closed: bool,
}

impl<W: Write> Pipe<W> {
    /// Writes to `out` in pieces of 64 KiB.
    pub fn new(out: W) -> Self {
        Pipe { out: BufWriter::with_capacity(1 << 16, out), is_closed: false }
    }

    /// # Errors
    /// When `out` fails otherwise than by having no reader.
    pub fn put(&mut self, text: &str) -> Result<()> {
        let result = if self.is_closed { Ok(()) } else { self.out.write_all(text.as_bytes()) };
        self.judge(result)
    }

    /// # Errors
    /// As [`Pipe::put`].
    pub fn flush(&mut self) -> Result<()> {
        let result = if self.is_closed { Ok(()) } else { self.out.flush() };
        self.judge(result)
    }

    /// Nobody reads any more.
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }

    fn judge(&mut self, result: io::Result<()>) -> Result<()> {
        match result {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.is_closed = true;
                Ok(())
            }
            result => result.context("writing to standard output"),
        }
    }
}
