//! Dates as definitions and QEMU write them, by the calendar of today, in UTC.

/// Days from 1 March of year 0 to 1 January 1970.
const EPOCH: i64 = 719_468;

/// `2026-11-23T03:14:15`, of seconds since the epoch.
pub fn date(seconds: i64) -> String {
    let (days, second) = (seconds.div_euclid(86_400).saturating_add(EPOCH), seconds.rem_euclid(86_400));
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let (day, month) = (day_of_year - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = year + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

/// Seconds since the epoch of such a date; `None` if it is none.
pub fn seconds(date: &str) -> Option<i64> {
    let number = |from: usize, to: usize| date.get(from..to)?.parse::<u32>().ok().map(i64::from);
    let marks = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')];
    let (text, rest) = date.split_at_checked(19)?;
    if !matches!(rest, "" | "Z") || marks.iter().any(|(at, mark)| text.as_bytes()[*at] != *mark) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let shifted = if month > 2 { year } else { year - 1 };
    let (era, of_era) = (shifted.div_euclid(400), shifted.rem_euclid(400));
    let of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - EPOCH;
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second;
    // What is no date (30 February) comes back as another.
    (self::date(seconds) == text).then_some(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (number, text) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_400, "2000-02-29T00:00:00"),
            (1_795_403_655, "2026-11-23T03:14:15"),
            (-1, "1969-12-31T23:59:59"),
            (4_107_542_400, "2100-03-01T00:00:00"),
        ] {
            assert_eq!(date(number), text);
            assert_eq!(seconds(text), Some(number));
        }
        assert_eq!(seconds("2026-11-23T03:14:15Z"), Some(1_795_403_655));
        for bad in [
            "",
            "2026-02-30T00:00:00",
            "2026-13-01T00:00:00",
            "2026-11-23 03:14:15",
            "2026-11-23T03:14:15+01",
            "é026-11-23T03:14:1",
        ] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }
}
