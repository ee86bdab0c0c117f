//! Which proxy leads to the API server, as client-go decides it: the kubeconfig's `proxy-url`, or else the environment's
//! HTTPS_PROXY (HTTP_PROXY for a plain address) unless NO_PROXY names the server. This machine itself has none.

use std::net::IpAddr;

use anyhow::Context as _;
use http::Uri;
use hyper_util::client::proxy::matcher::Matcher;

/// The proxy for `server`. `configured` is the kubeconfig's; `variable` reads the environment.
///
/// # Errors
/// When what names a proxy is no URL.
pub fn proxy(
    server: &Uri,
    configured: Option<&str>,
    variable: impl Fn(&str) -> Option<String>,
) -> anyhow::Result<Option<Uri>> {
    if let Some(url) = configured.filter(|url| !url.is_empty()) {
        return parse(url).with_context(|| format!("proxy-url {url}")).map(Some);
    }
    let host = server.host().unwrap_or_default().trim_matches(['[', ']']);
    if host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()) {
        return Ok(None);
    }
    let first = |names: [&str; 2]| names.into_iter().find_map(|name| variable(name).filter(|value| !value.is_empty()));
    let names =
        if server.scheme_str() == Some("http") { ["HTTP_PROXY", "http_proxy"] } else { ["HTTPS_PROXY", "https_proxy"] };
    let Some(url) = first(names) else { return Ok(None) };
    let exempt = first(["NO_PROXY", "no_proxy"]).unwrap_or_default();
    let matcher = Matcher::builder().all(url.clone()).no(exempt).build();
    if matcher.intercept(server).is_none() {
        return Ok(None);
    }
    parse(&url).with_context(|| format!("{} {url}", names[0])).map(Some)
}

/// "proxy:3128" is one for HTTP.
fn parse(url: &str) -> anyhow::Result<Uri> {
    let url: Uri = if url.contains("://") { url.parse()? } else { format!("http://{url}").parse()? };
    anyhow::ensure!(url.host().is_some_and(|host| !host.is_empty()), "the URL has no host");
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_is_the_kubeconfigs_or_the_environments_where_no_proxy_does_not_name_the_server() {
        type Environment = &'static [(&'static str, &'static str)];
        // server, proxy-url, environment, expected
        let table: [(&str, &str, Environment, Option<&str>); 11] = [
            ("https://10.0.0.1:6443", "", &[], None),
            ("https://10.0.0.1:6443", "", &[("HTTPS_PROXY", "http://p:3128")], Some("http://p:3128/")),
            ("https://10.0.0.1:6443", "", &[("https_proxy", "p:3128")], Some("http://p:3128/")),
            ("https://10.0.0.1:6443", "", &[("HTTP_PROXY", "http://p:3128")], None),
            ("http://10.0.0.1:6443", "", &[("HTTP_PROXY", "http://p:3128")], Some("http://p:3128/")),
            ("https://10.0.0.1:6443", "", &[("HTTPS_PROXY", "http://p:3128"), ("NO_PROXY", "x,10.0.0.0/8")], None),
            ("https://api.example:6443", "", &[("HTTPS_PROXY", "http://p:3128"), ("no_proxy", ".example")], None),
            (
                "https://api.example:6443",
                "",
                &[("HTTPS_PROXY", "http://p:3128"), ("NO_PROXY", "example.org")],
                Some("http://p:3128/"),
            ),
            ("https://127.0.0.1:6444", "", &[("HTTPS_PROXY", "http://p:3128")], None),
            ("https://127.0.0.1:6444", "socks5://u:p@s:1080", &[("NO_PROXY", "*")], Some("socks5://u:p@s:1080/")),
            ("https://[::1]:6444", "", &[("HTTPS_PROXY", "http://p:3128")], None),
        ];
        for (server, configured, environment, expected) in table {
            let variable =
                |name: &str| environment.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
            let found = proxy(&server.parse().unwrap(), Some(configured), variable).unwrap();
            assert_eq!(found.map(|url| url.to_string()).as_deref(), expected, "{server} {configured} {environment:?}");
        }
        let bad = proxy(&"https://10.0.0.1".parse().unwrap(), Some("http://"), |_| None);
        assert!(format!("{:#}", bad.unwrap_err()).contains("proxy-url http://"));
    }
}
