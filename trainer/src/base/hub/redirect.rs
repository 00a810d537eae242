//! Where an answer sends us on to, and whom the hub's secrets may be shown to.

use ureq::http::Uri;

/// Whether two addresses have the same scheme, host and port.
pub(super) fn is_same_origin(a: &str, b: &str) -> bool {
    let origin = |address: &str| -> Option<(String, String, u16)> {
        let uri: Uri = address.parse().ok()?;
        let scheme = uri.scheme_str()?.to_lowercase();
        let port = uri.port_u16().or(match scheme.as_str() {
            "https" => Some(443),
            "http" => Some(80),
            _ => None,
        })?;
        Some((scheme, uri.host()?.to_lowercase(), port))
    };
    origin(a).is_some() && origin(a) == origin(b)
}

/// The address of `location` in an answer from `address`; `None` if it is invalid.
pub(super) fn resolved(address: &str, location: &str) -> Option<String> {
    let (scheme, rest) = address.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let whole = match location {
        _ if location.starts_with("http://") || location.starts_with("https://") => location.to_owned(),
        _ if location.starts_with("//") => format!("{scheme}:{location}"),
        _ if location.starts_with('/') => format!("{scheme}://{authority}{location}"),
        _ => {
            let path = address.split(['?', '#']).next()?;
            let (folder, _) = path.rsplit_once('/').filter(|(folder, _)| folder.len() > scheme.len() + 3)?;
            format!("{folder}/{location}")
        }
    };
    whole.parse::<Uri>().ok().map(|_| whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let hub = "https://hub.example/api";
        assert!(is_same_origin(hub, "https://HUB.example:443/other"));
        for other in
            ["http://hub.example/", "https://hub.example:8443/", "https://a.hub.example/", "hub.example"]
        {
            assert!(!is_same_origin(hub, other), "{other}");
        }
    }

    #[test]
    fn locations_are_whole_or_taken_from_where_they_came() {
        let from = "https://hub.example:8443/a/b?x=1";
        for (location, expected) in [
            ("http://other/c", "http://other/c"),
            ("//other/c", "https://other/c"),
            ("/c/d?y", "https://hub.example:8443/c/d?y"),
            ("c", "https://hub.example:8443/a/c"),
        ] {
            assert_eq!(resolved(from, location).as_deref(), Some(expected));
        }
        assert_eq!(resolved("https://hub.example", "c"), None);
    }
}
