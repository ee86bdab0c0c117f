//! An error and its causes as one line, each cause once: many libraries repeat their cause in their own message.

use std::error::Error;

/// "message: cause: its cause", without causes that the text already holds.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_that_was_said_is_not_said_again() {
        let file = anyhow::anyhow!("No such file").context("cannot read /x: No such file").context("kubeconfig /x");
        assert_eq!(chain(file.as_ref()), "kubeconfig /x: cannot read /x: No such file");
        let plain = anyhow::anyhow!("refused").context("connect");
        assert_eq!(chain(plain.as_ref()), "connect: refused");
        assert_eq!(chain(anyhow::anyhow!("alone").as_ref()), "alone");
    }
}
